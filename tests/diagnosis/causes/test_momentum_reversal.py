"""A momentum that was raised, one that turned against the gradient, and both without what shows them."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import ADAMW, SGD, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding

ID = "momentum_reversal"
PLAIN_SGD = dataclasses.replace(SGD, groups=({"lr": 0.01, "momentum": 0},))


def changed(at=190, before=0.9, after=0.999, name="momentum"):
    detail = {"optimizer": "SGD", "group": 1, "name": name, "before": before, "after": after, "text": "It changed."}
    return Finding(detector="optimizer", kind="settings_changed", at=moment(at), detail=detail)


def blamed(group, **factors):
    shares = [{"factor": name, "group": "optimizer", "share": share} for name, share in factors.items()]
    return (
        LabResult("blame", {"episode": 1, "shares": {group: 1.0}}),
        LabResult("factors", {"episode": 1, "finer": shares}),
    )


def spiked(*findings, optimizer=SGD, cosine=None):
    run = Run(0, optimizer=optimizer)
    run.bump(200, 9.0, 15)
    run.bump_gradient(200, 9.0, 15)
    run.episodes = [an_episode(200, 202, 240, height=run.loss[202], before=0.35)]
    run.note(*findings)
    if cosine is not None:
        row, usual = run.row, 0.15 + 0.1 * np.random.default_rng(1).standard_normal(run.length)

        def more(ordinal):
            plain = row(ordinal)
            value = cosine if ordinal == 198 else float(usual[ordinal])
            return dataclasses.replace(plain, values={**plain.values, "momentum_cosine": value})

        run.row = more
    return run


def examined(run):
    store = run.store()
    return said_of("momentum_reversal", store, store.episodes[0])


@pytest.mark.parametrize(("optimizer", "name"), [(SGD, "momentum"), (ADAMW, "betas")])
def test_a_momentum_of_nearly_one_is_blamed_for_what_follows(optimizer, name):
    values = (0.9, 0.999) if name == "momentum" else ([0.9, 0.999], [0.999, 0.999])
    first = diagnose(spiked(changed(190, *values, name=name), optimizer=optimizer, cosine=0.1).store()).overall[0]
    assert (first.cause, first.change) == (ID, Change(setting="momentum", value=0.9))
    assert first.probability > 0.5
    assert "10 updates in place of 1000" in first.fixes[0]


@pytest.mark.parametrize(
    "other", [changed(after=0.95), changed(before=0.99, after=0.991), changed(name="eps"), changed(300)]
)
def test_another_change_is_not_this(other):
    assert examined(spiked(other)).total < 0.0


def test_it_is_told_where_the_loss_has_borne_it():
    run = Run(0, optimizer=SGD)
    run.episodes = []
    run.note(changed())
    assert [v.cause for v in diagnose(run.store()).overall] == [ID]


def test_momentum_that_points_against_the_gradient_is_seen_in_the_cosine_and_confirmed_by_the_experiment():
    against, along = spiked(cosine=-0.7), spiked(cosine=0.1)
    assert examined(against).total > 1.0
    assert examined(along).total < 0.0
    against.note(*blamed("optimizer", momentum=0.9, second_moments=0.0))
    verdicts = diagnose(against.store()).overall
    assert verdicts[0].cause == ID


def test_an_experiment_that_finds_the_state_without_fault_refutes_it():
    assert examined(spiked(*blamed("learning_rate"), cosine=-0.7)).total < 0.0


def test_without_momentum_it_is_out_of_the_question():
    assert examined(spiked(optimizer=PLAIN_SGD)).total < -4.0


def test_it_bears_anything():
    run = spiked(changed(before=[], after="x"), cosine=np.nan)
    run.grad[:] = np.inf
    assert np.isfinite(examined(run).total)


def test_a_step_that_went_up_the_gradients_speaks_for_it_and_one_that_was_too_long_against():
    totals = []
    for direction in ("wrong_direction", "unclear", "too_long"):
        detail = {"episode": 1, "direction": direction, "against": 0.3, "text": "So it went."}
        totals.append(examined(spiked(LabResult("measured", detail))).total)
    assert totals[0] > totals[1] > totals[2]


def test_a_state_at_fault_in_the_update_itself_is_not_refuted_by_steps_that_look_too_long():
    shares = [{"factor": "optimizer_state", "group": "optimizer", "share": 0.74}]
    factors = LabResult("factors", {"episode": 1, "shares": shares})
    alone = spiked(blamed("intrinsic")[0])
    both = spiked(blamed("intrinsic")[0], factors)
    assert examined(both).total > examined(alone).total + 3.0
    assert ID not in {v.cause for v in diagnose(both.store()).overall if v.probability > 0.2}


def test_a_rate_that_has_climbed_speaks_against_it():
    steady, climbing = spiked(cosine=-0.9), spiked(cosine=-0.9)
    climbing.rate = 0.01 * 1.04 ** np.clip(np.arange(climbing.length) - 150, 0, 60)
    assert examined(climbing).total < examined(steady).total - 1.0
