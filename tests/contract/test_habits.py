"""How code is written here, as far as a program can tell.

Widths, conditional expressions, thresholds with their sources, plain names.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "lightning_spike").rglob("*.py"))
PROSE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE = [*PACKAGE, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
WIDTH = 120
SOURCE = re.compile(
    r"engineering choice|\b(19|20)\d\d\b|et al\.|science\.md|mission\.md|python benchmarks/|arXiv|TheDeepChecker"
    r"|AUTOTRAINER|\bas (in|of) `|sigma|by definition|RFC"
)
"""A citation, a command of this repository that prints the number, another constant, or the plain statement that nobody
else chose it."""
JUDGING = ("detectors", "diagnosis", "lab", "samples", "sandbox")
"""Packages in which a number decides something about a run."""
VAGUE = {
    "MOST",
    "FEW",
    "FEWEST",
    "SOME",
    "MANY",
    "FAIR",
    "CLEAR",
    "SMALL",
    "LARGE",
    "LEAST",
    "SHARE",
    "NONE",
    "WORTH",
    "ENOUGH",
    "HIGH",
    "LOW",
    "FAR",
    "GONE",
    "SURE",
    "LONG",
    "WILD",
    "SAME",
    "HALF",
}


def wide_lines(path):
    """Lines that are wider than they should be; a table row and a line that is one long address cannot be wrapped."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if len(line) > WIDTH and not line.lstrip().startswith("|") and " " in line.strip():
            yield f"{path}:{number}: {len(line)} characters"


def nested_conditionals(tree):
    """Lines of conditional expressions that hold another one."""
    conditionals = [node for node in ast.walk(tree) if isinstance(node, ast.IfExp)]
    return [c.lineno for c in conditionals if any(isinstance(n, ast.IfExp) for n in ast.walk(c) if n is not c)]


def numeric_constants(tree):
    """Module-level constants with a number for a value, with the docstring below; `None` where there is none."""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not _is_number(node.value):
            continue
        name = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        is_doc = (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
        yield name.id, after.value.value if is_doc else None


def _is_number(value):
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    if isinstance(value, ast.BinOp):
        return _is_number(value.left) and _is_number(value.right)
    return (
        isinstance(value, ast.Constant) and isinstance(value.value, int | float) and not isinstance(value.value, bool)
    )


def unsourced(tree):
    """Names of numeric constants whose docstring gives neither a source nor "engineering choice".

    One that goes on ("…") has it from the one before.
    """
    missing, sourced = [], False
    for name, doc in numeric_constants(tree):
        goes_on = doc is not None and doc.startswith("…") and sourced
        sourced = goes_on or (doc is not None and SOURCE.search(doc) is not None)
        missing += [] if sourced else [name]
    return missing


def test_lines_wrap_at_120():
    assert not [found for path in [*CODE, *PROSE] for found in wide_lines(path)]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_conditional_expression_holds_another(path):
    assert nested_conditionals(ast.parse(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "path",
    [p for p in PACKAGE if p.relative_to(ROOT).parts[1] in JUDGING],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_thresholds_carry_their_source_and_say_what_they_limit(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert unsourced(tree) == []
    assert [name for name, _ in numeric_constants(tree) if name in VAGUE] == []


def test_the_checks_find_what_they_look_for(tmp_path):
    wide = tmp_path / "wide.py"
    wide.write_text("x = 1  # " + "word " * 30 + "\n| " + "cell " * 40 + "\n")
    assert len(list(wide_lines(wide))) == 1
    assert nested_conditionals(ast.parse("a = 1 if b else 2 if c else 3\nd = 1 if e else 2")) == [1]
    sourced = 'A: Final = 1\n"""Batches; engineering choice."""\nB: Final = -0.5\n"""… and more."""\n'
    assert unsourced(ast.parse(sourced + 'C = 2\n"""Just so."""\nD = "text"\n')) == ["C"]
