import math

import pytest

from lightning_spike.diagnosis.rank import Diagnosis
from lightning_spike.records import RunFacts, RunStatus
from lightning_spike.report import model
from lightning_spike.report.model import build_report
from lightning_spike.store import TrainerStateStore


def test_a_healthy_run_has_nothing_to_explain(healthy):
    assert healthy.healthy
    assert healthy.unexplained == 0.0
    assert (healthy.steps, healthy.batches, healthy.epochs) == (1200, 1200, 4)


def test_what_the_causes_leave_open_is_unexplained(troubled):
    assert troubled.unexplained == pytest.approx(1 - 0.91 - 0.05 - 0.01)
    assert [v.cause for v in troubled.likely] == ["lr_restart", "gradient_explosion"]
    assert [v.cause for v in troubled.faint] == ["bad_batch"]


def test_the_first_cause_is_worth_naming_however_faint(troubled_run, troubled, monkeypatch):
    monkeypatch.setattr(model, "diagnose", lambda store: Diagnosis(overall=troubled.causes[2:]))
    report = build_report(troubled_run, status=RunStatus.FINISHED, seconds=1.0)
    assert [v.cause for v in report.likely] == ["bad_batch"]
    assert report.faint == ()


def test_curves_keep_what_was_not_finite(troubled):
    at = dict(zip(troubled.loss.steps.tolist(), troubled.loss.values.tolist(), strict=True))
    assert math.isnan(at[803])
    assert math.isfinite(at[805])
    assert [c.name for c in troubled.rates] == ["lr-AdamW"]
    assert troubled.validation[0].steps.tolist() == [299, 599, 899, 1199]


def test_an_empty_store_is_a_report_too():
    report = build_report(TrainerStateStore(RunFacts(started="now")), status=RunStatus.EXCEPTION, seconds=0.0)
    assert (report.steps, report.loss, report.healthy) == (0, None, True)


def test_an_error_is_told_in_one_line_of_bearable_length(troubled_run):
    report = build_report(troubled_run, status=RunStatus.EXCEPTION, seconds=1.0, error=ValueError("a\nb" + 9999 * "x"))
    assert report.error.startswith("ValueError: a bx")
    assert len(report.error) < 330


def test_ctrl_c_is_no_error(troubled_run):
    report = build_report(troubled_run, status=RunStatus.INTERRUPTED, seconds=1.0, error=KeyboardInterrupt())
    assert report.error is None


def test_a_ranking_that_breaks_is_named(troubled_run, monkeypatch):
    def broken(store):
        msg = "x"
        raise KeyError(msg)

    monkeypatch.setattr(model, "diagnose", broken)
    report = build_report(troubled_run, status=RunStatus.FINISHED, seconds=1.0)
    assert report.disabled[-1].part == "diagnosis"
    assert len(report.episodes) == 2


def test_the_samples_that_stand_out_come_from_the_dumps(troubled):
    assert [(s.step, s.position, s.dataset_index) for s in troubled.suspects] == [(400, 1, 17), (400, 2, None)]
