import importlib
import io
import sys
import textwrap

import pytest
from rich.console import Console
from synthetic import Run, an_episode

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import RunStatus
from lightning_spike.report.json_file import read_report, write_report
from lightning_spike.report.model import build_report
from lightning_spike.report.terminal import TerminalReport

CONTRACT = {
    "data": "bad_batch nonfinite_input label_noise hard_sample_streak data_drift sample_weight_blowup",
    "learning_rate": "lr_too_high lr_restart lr_scheduler_fault warmup_too_short",
    "gradient": "gradient_explosion gradient_vanishing",
    "numerics": "numerical_instability activation_saturation weight_blowup bad_initialization",
    "optimizer": "stale_second_moment adam_epsilon_too_small momentum_reversal optimizer_state_corruption",
    "environment": "distributed_desync loss_scaling code_bug hardware_fault resume_fault",
    "generalization": "overfitting post_overfit_oscillation",
}
FAMILIES = {cause: family for family, causes in CONTRACT.items() for cause in causes.split()}

MOON = """
    from lightning_spike.diagnosis.cause import Cause, Examination
    from lightning_spike.records import Evidence, Family

    class FullMoon(Cause):
        \"\"\"It was the moon.\"\"\"

        id = "full_moon"
        family = Family.ENVIRONMENT
        title = "A full moon"

        def examine(self, case):
            told = Evidence(signal="moon", step=case.step, observed=1.0, expected=0.5, text="The moon was full.", weight=6.0)
            return Examination(evidence=(told,), summary="It was the moon.", fixes=("Wait 14 days.",))
"""


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


def test_causes_are_found_with_the_families_of_the_contract():
    found = {cause.id: cause.family.value for cause in catalogue()}
    assert len(found) == 27
    assert found == FAMILIES


def test_every_cause_explains_itself_and_only_known_ones_away():
    for cause in catalogue():
        text = type(cause).__doc__
        assert all(part in text for part in ("Seen by:", "Against it:", "Thresholds:", "To do:")), cause.id
        assert cause.explains <= FAMILIES.keys() - {cause.id}
        assert type(cause).__module__ == f"lightning_spike.diagnosis.causes.{cause.id}"


@pytest.mark.parametrize("value", ["moon_causes", "moon_causes:FullMoon"])
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
        ("x = 1", "moon_causes", "no subclass"),
        ("x = 1", "moon_causes:x", "no complete subclass"),
        ("x = 1", "moon_causes:y", "AttributeError"),
        (MOON.replace('id = "full_moon"', ""), "moon_causes", "has no id"),
        (MOON.replace("def examine", "def look"), "moon_causes:FullMoon", "no complete subclass"),
    ],
    ids=["raises", "nothing in it", "no class", "no such name", "no id", "abstract"],
)
def test_a_cause_that_cannot_be_used_costs_a_warning_and_no_more(installed, source, value, why):
    own = [cause.id for cause in catalogue()]
    installed(source, value)
    with pytest.warns(UserWarning, match=why):
        found = catalogue()
    assert [cause.id for cause in found] == own
    assert all(isinstance(cause, Cause) for cause in found)
