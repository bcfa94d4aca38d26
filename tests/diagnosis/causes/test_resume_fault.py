"""What a resume was found to have lost, soon before an episode, long before one, and without any."""

import dataclasses

import numpy as np
import pytest
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding

STATE = {"optimizer": "AdamW", "what": ["exp_avg_sq"], "saved": 3.5, "restored": 0.0, "text": "exp_avg_sq is gone."}
SCHEDULE = {
    "optimizer": "AdamW", "what": ["schedule"], "saved": 500, "restored": 0, "rate_saved": 0.00123,
    "rate_restored": 0.01,
    "text": "It begins again.",
}  # fmt: skip


def found(kind, **detail):
    return Finding(
        detector="resume", kind=kind, at=moment(0), detail=(STATE if kind == "optimizer_state" else SCHEDULE) | detail
    )


def a_run(*findings, onset=None, resumed="last.ckpt"):
    run = Run(0)
    run.facts = dataclasses.replace(run.facts, resumed_from=resumed, first_step=0)
    run.episodes = []
    if onset is not None:
        run.bump(onset, 9.0, 15)
        run.episodes = [an_episode(onset, onset, onset + 30, height=run.loss[onset], before=0.35)]
    run.note(*findings)
    return run


def examined(run):
    store = run.store()
    return said_of("resume_fault", store, store.episodes[0])


@pytest.mark.parametrize("onset", [None, 5, 40])
@pytest.mark.parametrize("kind", ["optimizer_state", "schedule"])
def test_what_was_lost_comes_first(kind, onset):
    first = diagnose(a_run(found(kind), onset=onset).store()).overall[0]
    assert (first.cause, first.change) == ("resume_fault", Change(setting="code", value="resume"))
    assert first.probability > 0.5
    assert ("exp_avg_sq" if kind == "optimizer_state" else "0.00123") in first.fixes[0]


def test_the_rate_and_the_place_to_go_back_to_are_named():
    assert "to 500 " in examined(a_run(found("schedule"), onset=5)).fixes[0]
    only = found("schedule", what=["lr"], saved=0.00123, restored=0.1)
    assert "to 0.00123," in examined(a_run(only, onset=5)).fixes[0]


def test_it_weighs_less_long_after():
    totals = [examined(a_run(found("schedule"), onset=onset)).total for onset in (20, 200)]
    assert totals[0] > totals[1] > 1.0


def test_a_run_that_was_not_resumed_is_cleared():
    assert examined(a_run(onset=5, resumed=None)).total < -3.0


def test_a_sound_resume_is_not_blamed_for_a_spike_after_it():
    told = {v.cause: v.probability for v in diagnose(a_run(onset=4).store()).overall}
    assert told.get("resume_fault", 0.0) < 0.1
    assert diagnose(a_run().store()).overall == ()


def test_a_schedule_that_began_again_explains_the_rate():
    run = a_run(found("schedule"), onset=30)
    run.rate[:] = 0.1
    run.bump_gradient(25, 30.0, 20)
    assert diagnose(run.store()).overall[0].cause == "resume_fault"


@pytest.mark.parametrize("value", [None, np.nan, np.inf, "x"])
@pytest.mark.parametrize("kind", ["optimizer_state", "schedule"])
def test_bears_missing_and_broken_values(kind, value):
    broken = found(kind, what=value, saved=value, restored=value, rate_saved=value, text=value, optimizer=value)
    examination = examined(a_run(broken, onset=5))
    assert np.isfinite(examination.total)
    assert examination.supported
