"""The printed report against texts in `expected/`.

Write them anew with `pytest tests/report --write-expected`, and read what changed.
"""

import dataclasses
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.console import Console

from lightning_spike.records import Disabled, Evidence, RunStatus
from lightning_spike.report.terminal import TerminalReport

EXPECTED = Path(__file__).parent / "expected"


def printed(report, width, *, files=("report.json", "report.html", "signals"), notes=()):
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(TerminalReport(report=report, files=[Path("runs/spike") / name for name in files], notes=notes))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("name", ["troubled", "healthy"])
def test_it_reads_as_agreed(request, name, width):
    text = printed(request.getfixturevalue(name), width)
    path = EXPECTED / f"{name}-{width}.txt"
    if request.config.getoption("--write-expected", default=False):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [72, 80, 160])
def test_the_verdict_and_the_first_fix_stand_in_the_first_ten_lines_even_of_a_run_that_died(troubled, width):
    died = dataclasses.replace(troubled, status=RunStatus.EXCEPTION, error=f"RuntimeError: {'no ' * 90}")
    lines = printed(died, width).splitlines()[:10]
    first = troubled.causes[0]
    assert any(line.startswith(f"1  {first.cause}") for line in lines)
    shown = " ".join(" ".join(lines).split())
    assert first.summary in shown
    assert f"→ {first.fixes[0]}" in shown


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160, 240])
def test_no_line_is_wider_than_the_terminal_or_ends_in_blanks(troubled, width):
    lines = printed(troubled, width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line != line.rstrip()] == []


def test_why_a_cause_was_not_replayed_stands_below_it(troubled):
    first, *others = troubled.causes
    untested = dataclasses.replace(troubled, causes=(dataclasses.replace(first, confirmed=None), *others))
    known = dataclasses.replace(untested, not_replayed={2: "several ranks"})
    assert "not confirmed by replay: several ranks" in printed(known, 100)
    assert "several ranks" not in printed(untested, 100)
    assert "several ranks" not in printed(dataclasses.replace(troubled, not_replayed={2: "several ranks"}), 100)


def test_a_healthy_run_is_one_line(healthy):
    text = printed(healthy, 100)
    assert text.count("\n") == 1
    assert text.startswith("lightning-spike: no trouble in 1,200 steps (4 epochs, 12 s)")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (RunStatus.EXCEPTION, "before ValueError: no"),
        (RunStatus.INTERRUPTED, ", interrupted"),
        (RunStatus.STOPPED_EARLY, ", stopped early"),
    ],
)
def test_a_healthy_run_that_ended_otherwise_says_how_in_its_line(healthy, status, said):
    ended = dataclasses.replace(healthy, status=status, error="ValueError: no" if "before" in said else None)
    text = printed(ended, 200)
    assert said in text
    assert text.count("\n") == 1


def test_what_broke_is_said_on_a_healthy_run_too(healthy):
    broken = dataclasses.replace(healthy, disabled=(Disabled(part="GradNormMonitor", reason="KeyError: 3", step=7),))
    assert printed(broken, 100).splitlines()[1:] == [
        "! GradNormMonitor broke at step 7 and was switched off: KeyError: 3"
    ]


def test_what_was_not_written_is_said(healthy):
    assert "pip install" in printed(healthy, 100, notes=["report.html needs: pip install 'lightning-spike[html]'"])


def test_episodes_without_a_cause_are_unexplained(troubled):
    text = printed(dataclasses.replace(troubled, causes=(), causes_of={}), 100)
    assert "2 episodes, unexplained" in text
    assert "unexplained: 100 %" in text


def test_strings_of_the_user_are_no_markup(troubled):
    first = dataclasses.replace(
        troubled.causes[0],
        summary="[bold]not bold[/bold] :smile:",
        evidence=(Evidence(signal="loss/[red]", step=1, observed=1.0, expected=None, text="[/]"),),
    )
    text = printed(dataclasses.replace(troubled, causes=(first,)), 100)
    assert "[bold]not bold[/bold] :smile:" in text
    assert "[/]  [loss/[red] at step 1: 1]" in text


def test_many_episodes_are_cut_to_the_worst(troubled):
    many = tuple(dataclasses.replace(troubled.episodes[0], id=i, severity=float(i % 10)) for i in range(1, 51))
    text = printed(dataclasses.replace(troubled, episodes=many), 100)
    assert "and 44 milder episodes in the files" in text


def test_a_terminal_that_knows_only_ascii_gets_ascii(troubled):
    raw = BytesIO()
    with TextIOWrapper(raw, encoding="ascii") as stream:
        Console(file=stream, width=100, color_system=None).print(TerminalReport(report=troubled))
        stream.flush()
        text = raw.getvalue().decode("ascii")
    assert "most likely lr_restart (91 %)" in text
    assert "##################.." in text


def test_colour_is_there_where_it_can_be(troubled):
    console = Console(file=StringIO(), width=100, color_system="standard", force_terminal=True)
    console.print(TerminalReport(report=troubled))
    assert "\x1b[" in console.file.getvalue()
