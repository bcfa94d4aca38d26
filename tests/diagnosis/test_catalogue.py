import importlib
import io
import pkgutil
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
from other_package import CAUSE as MOON
from rich.console import Console
from synthetic import Run, an_episode

from lightning_spike.diagnosis import causes
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.diagnosis.weigh import SYMPTOMS_OF
from lightning_spike.records import RunStatus
from lightning_spike.report.json_file import read_report, write_report
from lightning_spike.report.model import build_report
from lightning_spike.report.terminal import TerminalReport

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package in a temporary folder, with metadata as an installer leaves them."""

    def install(source, value):
        (tmp_path / "moon_causes.py").write_text(textwrap.dedent(source))
        info = tmp_path / "moon_causes-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon-causes\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lightning_spike.causes]\nmoon = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "moon_causes", raising=False)
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("moon_causes", None)


def test_every_file_of_causes_holds_the_cause_it_is_named_for():
    files = {module.name for module in pkgutil.iter_modules(causes.__path__)}
    assert {cause.id for cause in catalogue()} == files


def test_the_table_of_the_readme_follows_from_the_causes():
    script = runpy.run_path(str(README.parent / "docs" / "make_tables.py"))
    text = README.read_text("utf-8")
    assert script["with_table"](text, "causes", script["cause_table"]()) == text, "run: make docs"


def test_every_cause_says_how_it_is_seen_and_explains_only_known_ones_away():
    known = {cause.id for cause in catalogue()}
    for cause in catalogue():
        text = importlib.import_module(f"lightning_spike.diagnosis.causes.{cause.id}").__doc__
        assert all(part in text for part in ("Seen by:", "Against it:", "Thresholds:", "To do:")), cause.id
        assert cause.explains <= known - {cause.id}
        assert not cause.explains & SYMPTOMS_OF.get(cause.family, frozenset()), "derived from the family already"


@pytest.mark.parametrize("value", ["moon_causes", "moon_causes:MOON"])
def test_a_cause_of_another_package_is_one_file_and_stands_in_ranking_and_report(installed, tmp_path, value):
    installed(MOON, value)
    run = Run(0, 300)
    run.episodes = [an_episode(150, 150, 170)]
    store = run.store()
    first = diagnose(store).overall[0]
    assert (first.cause, first.fixes) == ("full_moon", ("Wait 14 days.",))
    report = build_report(store, status=RunStatus.FINISHED, seconds=1.0)
    write_report(report, tmp_path / "report.json")
    written = read_report(tmp_path / "report.json")
    for listed in (written["causes"][0], written["episodes"][0]["causes"][0]):
        assert (listed["cause"], listed["family"], listed["fixes"]) == ("full_moon", "environment", ["Wait 14 days."])
    console = Console(width=120, file=io.StringIO())
    console.print(TerminalReport(report=report))
    printed = console.file.getvalue()
    assert all(words in printed for words in ("full_moon", "It was the moon.", "The moon was full.", "Wait 14 days."))


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("raise RuntimeError('no moon')", "moon_causes", "no moon"),
        ("x = 1", "moon_causes", "expected a lightning_spike"),
        ("x = 1", "moon_causes:x", "expected a lightning_spike"),
        ("x = 1", "moon_causes:y", "AttributeError"),
        (MOON.replace('id="full_moon",', ""), "moon_causes", "missing 1 required keyword-only argument: 'id'"),
    ],
    ids=["raises", "nothing in it", "no cause", "no such name", "no id"],
)
def test_a_cause_that_cannot_be_used_costs_a_warning_and_no_more(installed, source, value, why):
    own = [cause.id for cause in catalogue()]
    installed(source, value)
    with pytest.warns(UserWarning, match=why):
        found = catalogue()
    assert [cause.id for cause in found] == own
    assert all(isinstance(cause, Cause) for cause in found)
