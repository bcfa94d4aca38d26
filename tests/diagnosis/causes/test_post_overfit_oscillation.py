"""Swings of a loss near its floor.

After the validation loss had turned, before it had, without any, a single rise; and of a net that knows two batches by
heart.
"""

import math

import numpy as np
import pytest
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.causes.post_overfit_oscillation import CAUSE
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Recovery, ValidationPoint


def a_run(*, validations=(0.6, 0.5, 0.55, 0.6, 0.7), swings=True, level=0.03):
    run = Run(0, noise=0.1)
    run.loss[:] = level + 2.0 * np.exp(-np.arange(run.length) / 30)
    past = np.arange(run.length) - 230
    up = (past >= 0) & ((past % 10 >= 5) if swings else (past >= 0))
    run.loss[up] *= 1.0 + 0.2 * past[up]
    for k, value in enumerate(validations):
        run.note(ValidationPoint(at=moment(40 * k + 39), metric="val_loss", value=value, train_loss=level))
    run.episodes = [
        an_episode(
            235,
            399,
            kind=EpisodeKind.OSCILLATION,
            before=level,
            height=float(run.loss[230:].max()),
            recovery=Recovery.NEVER,
        )
    ]
    return run


def by_heart(*, high="altered", **options):
    """The same two batches in turn from 60 on.

    From 230 on, in every second five, altered ones have the high loss (or all have it).
    """
    run = a_run(**{"validations": (0.9, 0.8, 0.7, 0.6, 0.5), "level": 0.68, **options})
    rng = np.random.default_rng(2)
    for ordinal in range(60, run.length):
        for series in (run.max_abs, run.std, run.mean):
            series[ordinal] = series[60 + ordinal % 2]
        if high == "altered" and ordinal >= 230 and ordinal % 10 >= 5:
            run.std[ordinal] *= 1.1 + rng.random()
    return run


def examined(run, **options):
    store = run.store(**options)
    return said_of("post_overfit_oscillation", store, store.episodes[0])


def test_swings_after_the_validation_has_turned_come_first_and_name_the_step_to_stop_at():
    first, *rest = diagnose(a_run().store()).overall
    assert (first.cause, first.probability > 0.5) == ("post_overfit_oscillation", True)
    assert all(v.probability < 0.2 for v in rest)
    assert first.change == Change(setting="max_steps", value=79)
    assert "Stop at step 79" in first.fixes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"validations": (0.9, 0.8, 0.7, 0.6, 0.5)},
        {"validations": ()},
        {"validations": (0.6, 0.7)},
        {"swings": False},
        {"level": 0.68},
    ],
    ids=["still falling", "none", "too few", "a single rise", "training loss as high"],
)
def test_with_one_piece_missing_it_is_not_the_verdict(options):
    told = {v.cause: v.probability for v in diagnose(a_run(**options).store()).overall}
    assert told.get("post_overfit_oscillation", 0.0) < 0.5
    assert examined(a_run(**options)).total < examined(a_run()).total - 2.5


def test_the_swings_are_counted():
    text = next(e for e in examined(a_run()).evidence if "came back" in e.text)
    # 1 + 0.2 * 165 at most: 0.6 of the way up is reached from 36 batches on, so by the swings that begin at 35, 45, ...
    # 155
    assert text.observed == 13


def test_a_net_that_knows_two_batches_by_heart_has_overfitted_whatever_the_validation_says():
    first, *rest = diagnose(by_heart().store()).overall
    assert (first.cause, first.probability > 0.5) == ("post_overfit_oscillation", True)
    assert all(v.probability < 0.2 for v in rest)
    assert "same 2 repeated batches" in first.summary


def test_the_very_batches_that_are_known_by_heart_have_no_high_loss_of_it():
    assert examined(by_heart(high="all", swings=False)).total < 0.0 < examined(by_heart()).total - 5.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_any_value_is_borne(value):
    run = a_run(validations=(0.6, value, 0.5, value, 0.7))
    run.loss[240:250] = value
    assert math.isfinite(examined(run).total)
    assert math.isfinite(examined(run, without=("loss",)).total)


def test_a_single_validation_above_the_best_is_no_turn():
    once, twice = (
        examined(a_run(validations=v)).total for v in ((0.7, 0.6, 0.55, 0.5, 0.55), (0.7, 0.6, 0.5, 0.55, 0.55))
    )
    assert once < twice - 2.0


def test_a_loss_that_is_not_finite_is_no_swing():
    assert EpisodeKind.NONFINITE not in CAUSE.applies_to
