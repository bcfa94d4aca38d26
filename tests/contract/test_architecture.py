"""Which package may import which: the order that they stand in, and that no file imports itself by a detour."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "lightning_spike"

GROUND = ("errors", "arguments", "files", "records", "experiments", "codec", "rolling", "store")
"""Files at the top that everything may stand on."""

PACKAGES = {
    "signals": set(),
    "detectors": set(),
    "record": {"signals"},
    "flight": {"signals", "detectors", "record"},
    "diagnosis": {"detectors"},
    "ranks": set(),
    "sandbox": {"signals", "record", "ranks"},
    "samples": {"signals", "record", "sandbox"},
    "actions": {"signals", "record", "samples"},
    "lab": {"signals", "diagnosis", "record", "flight", "ranks", "sandbox", "samples", "actions"},
    "report": {"diagnosis"},
    "callbacks": {
        "signals", "detectors", "record", "diagnosis", "flight", "ranks", "sandbox", "samples", "actions", "lab",
        "report",
    },
    "testing": {"signals"},
    "demo": {"report"},
    "replay": {"actions", "lab", "report"},
    "cli": {"callbacks", "demo", "lab", "replay", "report"},
    "__init__": {"callbacks", "cli"},
}  # fmt: skip
"""By package, or file at the top, what it may import beside the ground and itself; each only what stands before it. The
ground imports the ground alone."""

WITHOUT_TORCH = {*GROUND, "detectors", "diagnosis"}
"""What works on numbers that are on the host already, so that it can be tested, and read, without a training."""
WITHOUT_LIGHTNING = {*WITHOUT_TORCH, "signals"}


def imports(root):
    """By file of a package, all that it imports, as dotted names; under `TYPE_CHECKING` and inside functions too."""
    return {_name(root, path): _imports(root, path) for path in sorted(root.rglob("*.py"))}


def _name(root, path):
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts)


def _imports(root, path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_file(root, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [root.name, *path.relative_to(root).parts[: -node.level]]
                base = ".".join([*above, *filter(None, [node.module])])
            found |= {_file(root, f"{base}.{alias.name}", base) for alias in node.names}
    return found - {_name(root, path)}


def _file(root, name, otherwise=None):
    """The file of the package that a name is in; a name from elsewhere as it is."""
    for candidate in filter(None, (name, otherwise)):
        first, *rest = candidate.split(".")
        place = root.joinpath(*rest)
        if first == root.name and place.with_suffix(".py").is_file() and rest:
            return candidate
        if first == root.name and (place / "__init__.py").is_file():
            return f"{candidate}.__init__"
    return otherwise or name


def room_of(name):
    """The package, or the file at the top, that a file of ours belongs to."""
    return name.split(".")[1]


def trespasses(root, ground, packages):
    """Imports against the table, as "file imports file"; and files that are in no room."""
    found = []
    for name, others in imports(root).items():
        room = room_of(name)
        if room not in packages and room not in ground:
            found.append(f"{name} is not in the table")
            continue
        allowed = {room, *ground, *packages.get(room, ())}
        ours = (other for other in sorted(others) if other.split(".")[0] == root.name)
        found += [f"{name} imports {other}" for other in ours if room_of(other) not in allowed]
    return found


def cycle(root):
    """Files that import each other in a ring, the first one again at the end; empty where there is none."""
    graph = imports(root)
    done, way = set(), []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in graph:
            return []
        way.append(name)
        ring = next(filter(None, map(visit, sorted(graph[name]))), [])
        way.pop()
        done.add(name)
        return ring

    return next(filter(None, map(visit, sorted(graph))), [])


def users_of(root, library, rooms):
    """Files of these rooms that import a library."""
    graph = imports(root)
    return [name for name, others in graph.items() if room_of(name) in rooms and _names(library, others)]


def _names(library, others):
    return any(other.split(".")[0] == library for other in others)


def test_every_package_imports_only_what_it_may():
    assert trespasses(ROOT, GROUND, PACKAGES) == []


def test_the_table_is_an_order_and_names_what_is_there():
    before = set()
    for name, may in PACKAGES.items():
        assert may <= before, name
        before.add(name)
    there = {room_of(name) for name in imports(ROOT)}
    assert there == {*PACKAGES, *GROUND}


def test_no_permission_is_left_unused_but_that_of_the_lab_for_the_diagnosis():
    used = {name: set() for name in PACKAGES}
    for name, others in imports(ROOT).items():
        used.get(room_of(name), set()).update(room_of(o) for o in others if o.split(".")[0] == ROOT.name)
    unused = {(name, other) for name, may in PACKAGES.items() for other in may - used[name]}
    assert unused <= {("lab", "diagnosis")}


def test_no_file_imports_itself_by_a_detour():
    assert cycle(ROOT) == []


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("torch", WITHOUT_TORCH),
        ("lightning", WITHOUT_LIGHTNING),
        ("pytorch_lightning", WITHOUT_LIGHTNING),
    ],
)
def test_what_needs_no_training_imports_none(library, rooms):
    assert users_of(ROOT, library, rooms) == []


# -- that each of them can fail ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A package of a ground, a room below and a room above, to which files are added."""

    def make(**files):
        root = tmp_path / "house"
        standing = {
            "errors": "",
            "low/__init__": "",
            "low/beam": "from house.errors import Bad\n",
            "high/__init__": "",
            "high/roof": "import house.low.beam\n",
        }
        for name, text in (standing | files).items():
            path = root / f"{name.replace('__', '/') if '/' not in name else name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return root

    return make


TABLE = {"low": set(), "high": {"low"}}

UPWARDS = [
    pytest.param("from house.high.roof import tiles\n", id="plain"),
    pytest.param("from house.high import roof\n", id="a-module-from-its-package"),
    pytest.param("import house.high.roof as over\n", id="import-as"),
    pytest.param("from ..high import roof\n", id="relative"),
    pytest.param("def f():\n    from house.high.roof import tiles\n", id="in-a-function"),
    pytest.param(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high.roof import tiles\n",
        id="for-types-only",
    ),
]


@pytest.mark.parametrize("text", UPWARDS)
def test_an_import_upwards_is_seen(tree, text):
    root = tree(low__wall=text)
    assert trespasses(root, ("errors",), TABLE) == ["house.low.wall imports house.high.roof"]


def test_a_tree_that_obeys_is_passed(tree):
    root = tree()
    assert trespasses(root, ("errors",), TABLE) == []
    assert cycle(root) == []
    assert users_of(root, "torch", {"low", "errors"}) == []


def test_the_ground_may_not_stand_on_a_room_and_a_room_must_be_in_the_table(tree):
    root = tree(errors="import house.low.beam\n", cellar__box="")
    assert trespasses(root, ("errors",), TABLE) == [
        "house.cellar.box is not in the table",
        "house.errors imports house.low.beam",
    ]


@pytest.mark.parametrize("text", UPWARDS)
def test_a_ring_of_files_is_seen(tree, text):
    root = tree(**{"low/beam": text})
    assert cycle(root) == ["house.high.roof", "house.low.beam", "house.high.roof"]


@pytest.mark.parametrize(
    "text", ["import torch\n", "from torch.nn import Linear\n", "def f():\n    import torch.nn as nn\n"]
)
def test_an_import_of_torch_is_seen(tree, text):
    root = tree(low__wall=text)
    assert users_of(root, "torch", {"low"}) == ["house.low.wall"]
    assert users_of(root, "torch", {"high"}) == []


def test_the_standard_library_is_no_room_of_ours(tree):
    root = tree(low__wall="import sys\nfrom collections import Counter\n")
    assert imports(root)["house.low.wall"] == {"sys", "collections"}
    assert "sys" in sys.stdlib_module_names
