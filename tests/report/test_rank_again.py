"""A run that is over is ranked again from its files, as it was and with other knowledge."""

import dataclasses
import json

import pytest

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.errors import UnreadableReportError
from lightning_spike.experiments import Cooldown, Experiments, StepSize, StepSizeTest
from lightning_spike.records import RunStatus
from lightning_spike.report import rank_again as module
from lightning_spike.report.json_file import with_nonfinite, write_report
from lightning_spike.report.model import build_report
from lightning_spike.report.rank_again import rank_again, store_of
from lightning_spike.report.read_back import report_from
from lightning_spike.report.signals_file import read_signals, write_signals

STEP_SIZE = StepSize(rho=float("nan"), worsened=0.5, against=0.0, overshot=0.5, updates=4)


@pytest.fixture
def examined(troubled, troubled_run):
    """The troubled run with something from the lab."""
    troubled_run.note(Experiments(episode=1, step_size=STEP_SIZE, cooldown=Cooldown(before=2.0, after=1.0, steps=3)))
    troubled_run.note(StepSizeTest(at=troubled_run.history.moment(500), result=STEP_SIZE))
    return troubled_run


@pytest.fixture
def files(examined, tmp_path):
    """What the run wrote, read back: the content of report.json, and the signals."""
    write_report(
        build_report(examined, status=RunStatus.FINISHED, seconds=1.0), tmp_path / "report.json", files=["signals"]
    )
    content = json.loads((tmp_path / "report.json").read_text())
    return with_nonfinite(content), read_signals(write_signals(examined, tmp_path / "signals"))


def test_the_store_is_as_it_was(examined, files):
    content, signals = files
    store = store_of(report_from(content, signals), signals)
    assert repr(store.experiments) == repr(examined.experiments)
    assert repr(store.step_size_tests) == repr(examined.step_size_tests)
    assert repr(store.episodes) == repr(examined.episodes)  # as text, for one holds a NaN
    for name in ("facts", "findings", "validations", "disabled", "remarks", "layer_names"):
        assert getattr(store, name) == getattr(examined, name), name
    for signal in (*examined.history.signals, "ordinal"):
        assert repr(store.history.series(signal)) == repr(examined.history.series(signal))
        assert (store.history.present(signal) == examined.history.present(signal)).all()
    rows, before = (s.layer_rows("grad_norm", 0, 10**6) for s in (store, examined))
    assert repr([(r.at, r.values.tolist()) for r in rows]) == repr([(r.at, r.values.tolist()) for r in before])


def test_other_knowledge_ranks_otherwise_and_all_else_stays(files, monkeypatch):
    content, signals = files
    report = report_from(content, signals)
    monkeypatch.setattr(module, "diagnose", lambda store: diagnose(store, causes=()))
    again = rank_again(report, signals)
    assert report.causes
    assert again.causes == ()
    assert (again.episodes, again.steps, again.status) == (report.episodes, report.steps, report.status)


def test_an_older_report_says_why_it_cannot_be_ranked_again(files):
    content, signals = files
    with pytest.raises(UnreadableReportError, match="an older version wrote it"):
        rank_again(report_from({key: v for key, v in content.items() if key != "recorded"}, signals), signals)


def test_a_table_without_a_column_is_named(files):
    content, signals = files
    series = {name: column for name, column in signals.series.items() if name != "epoch"}
    with pytest.raises(UnreadableReportError, match="'epoch'"):
        rank_again(report_from(content, signals), dataclasses.replace(signals, series=series))
