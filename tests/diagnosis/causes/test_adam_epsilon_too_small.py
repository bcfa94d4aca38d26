"""An epsilon that was lowered, one that was so all along, and gradients that have faded."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import ADAMW, SGD, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery

ID = "adam_epsilon_too_small"


def changed(at=199, before=1e-8, after=0.0, name="eps"):
    detail = {"optimizer": "AdamW", "group": 1, "name": name, "before": before, "after": after, "text": "It changed."}
    return Finding(detector="optimizer", kind="settings_changed", at=moment(at), detail=detail)


def not_a_number(*findings, optimizer=ADAMW):
    run = Run(0, optimizer=optimizer)
    run.loss[200:], run.grad[200:] = np.nan, np.nan
    run.episodes = [an_episode(200, kind=EpisodeKind.NONFINITE, height=np.nan, recovery=Recovery.NEVER, severity=99.0)]
    run.note(*findings)
    return run


def adam(eps):
    return dataclasses.replace(ADAMW, groups=({"lr": 0.01, "betas": (0.9, 0.999), "eps": eps},))


def examined(run):
    store = run.store()
    return said_of("adam_epsilon_too_small", store, store.episodes[0])


def test_an_epsilon_that_becomes_nothing_just_before_did_it():
    first, *others = diagnose(not_a_number(changed()).store()).overall
    assert (first.cause, first.change) == (ID, Change(setting="eps", value=1e-6))
    assert first.probability > 0.8
    assert all(v.probability < 0.1 for v in others)
    assert "from 1e-08 to 0" in first.summary


def test_it_is_told_where_the_loss_has_borne_it():
    run = Run(0)
    run.episodes = []
    run.note(changed(150, after=1e-30))
    (only,) = diagnose(run.store()).overall
    assert (only.cause, only.episodes) == (ID, ())


@pytest.mark.parametrize(
    "other", [changed(after=1e-6), changed(before=1e-8, after=5e-9), changed(name="weight_decay"), changed(at=240)]
)
def test_another_change_of_a_setting_is_not_this(other):
    assert examined(not_a_number(other)).total < 0.0


@pytest.mark.parametrize(("eps", "speaks"), [(0.0, True), (1e-30, True), (1e-8, False), (1e-6, False)])
def test_an_epsilon_that_was_nothing_from_the_start(eps, speaks):
    assert (examined(not_a_number(optimizer=adam(eps))).total > 0.0) is speaks


def test_an_optimizer_without_epsilon_cannot_have_it():
    assert examined(not_a_number(optimizer=SGD)).total < -4.0


def test_the_experiment_that_blames_epsilon_decides():
    shares = [{"factor": "epsilon", "group": "optimizer", "share": 0.9}]
    told = LabResult("factors", {"episode": 1, "finer": shares})
    assert examined(not_a_number(told)).total > examined(not_a_number()).total + 4.0


def test_it_bears_anything():
    run = not_a_number(changed(before=None), changed(before="a", after=[]), optimizer=adam(1e-30))
    run.grad[:] = np.nan
    assert np.isfinite(examined(run).total)
