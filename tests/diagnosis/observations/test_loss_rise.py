"""Trouble in runs without an episode.

A rise beside an event of the rate, steps that are long against the weights, a start that threw the weights away.
"""

import numpy as np
import pytest
from synthetic import Run, an_episode, moment

from lightning_spike.diagnosis.observations.loss_rise import rise_after
from lightning_spike.diagnosis.observations.rates import start_of_climb
from lightning_spike.diagnosis.observations.step_length import (
    keeps_falling,
    lengthened,
    long_steps,
    oversized_first_updates,
    passed_early_peak,
)
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.experiments import StepSize, StepSizeTest
from lightning_spike.records import EpisodeKind

STEPS = np.arange(400)


def quiet(seed=1, noise=0.25):
    """A run that no detector has seen anything in: what is bent into it is for the causes alone."""
    run = Run(seed=seed, length=400, noise=noise)
    run.loss = 0.4 * np.exp(noise * np.random.default_rng(seed).standard_normal(400))
    run.episodes = []
    return run


def measured(run, share, norm=10.0):
    """Every tenth update is measured, as WeightMonitor does."""
    norm = np.broadcast_to(np.asarray(norm, dtype=float), (400,))
    every = np.where(STEPS % 10 == 0, 1.0, np.nan)
    run.more = {"weight_norm": norm * every, "update_norm": np.asarray(share) * norm * every}
    return run


def named(run):
    return {v.cause: v.probability for v in diagnose(run.store()).overall}


# -- a rise
# -------------------------------------------------------------------------------------------------------------


def test_a_rise_is_told_with_its_levels_and_where_it_is_back():
    run = quiet()
    run.loss[220:300] *= 2.0
    rise = rise_after(run.store(), 200)
    assert rise is not None
    assert rise.before == pytest.approx(0.4, rel=0.1)
    assert rise.peak == pytest.approx(0.8, rel=0.15)
    assert 205 <= rise.begun.ordinal <= 225
    assert rise.end is not None
    assert 285 <= rise.end.ordinal <= 325


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_falling_loss_are_no_rise(seed):
    run = quiet(seed)
    assert rise_after(run.store(), 200) is None
    run.loss *= np.exp(-STEPS / 300)
    assert rise_after(run.store(), 200) is None


def test_too_few_losses_and_losses_below_zero_say_nothing():
    run = quiet()
    run.loss[220:] *= 2.0
    assert rise_after(run.store(), 10) is None
    assert rise_after(run.store(), 390) is None
    run.loss -= 0.5
    assert rise_after(run.store(), 200) is None


# -- events of the rate
# --------------------------------------------------------------------------------------------------


def test_a_jump_of_the_rate_after_which_the_loss_lies_higher_is_named():
    run = quiet()
    run.rate[200:] *= 10.0
    run.loss[205:] *= 1.6
    assert max(named(run), key=named(run).get) == "lr_scheduler_fault"


def test_a_jump_that_leaves_the_loss_where_it_was_is_not():
    run = quiet()
    run.rate[200:] *= 10.0
    assert named(run) == {}


def test_a_jump_after_which_updates_are_long_against_the_weights_is():
    run = measured(quiet(), np.where(STEPS <= 200, 0.002, 0.03))
    run.rate[200:] *= 10.0
    assert lengthened(run.store(), 200)
    assert not lengthened(run.store(), 100)
    assert max(named(run), key=named(run).get) == "lr_scheduler_fault"


def test_a_rate_that_climbs_while_the_loss_rises_is_too_high():
    run = quiet()
    run.rate = 0.01 * 1.03 ** np.clip(STEPS - 180, 0, 80)
    run.loss[230:] *= 1.6
    climb = start_of_climb(run.store())
    assert climb is not None
    assert 180 < climb.ordinal < 200
    assert max(named(run), key=named(run).get) == "lr_too_high"


@pytest.mark.parametrize(
    "rate",
    [
        np.full(400, 0.01),
        0.01 * np.minimum((STEPS + 1) / 100, 1.0),
        0.01 * (1 + np.cos(np.pi * STEPS / 400)),
    ],
    ids=["steady", "warm-up", "cosine"],
)
def test_other_courses_do_not_climb(rate):
    run = quiet()
    run.rate = rate
    assert start_of_climb(run.store()) is None


# -- the length of steps
# -------------------------------------------------------------------------------------------------


def test_long_steps_through_the_second_half_are_a_rate_too_high():
    run = measured(quiet(), np.full(400, 0.02))
    steps = long_steps(run.store())
    assert steps is not None
    assert steps.share == pytest.approx(0.02)
    assert max(named(run), key=named(run).get) == "lr_too_high"


def test_long_steps_at_the_start_alone_are_not():
    run = measured(quiet(), np.where(STEPS < 150, 0.05, 0.003))
    assert long_steps(run.store()) is None
    assert named(run) == {}


def test_long_steps_that_have_become_short_are_over():
    run = measured(quiet(), np.where(STEPS < 350, 0.02, 0.004))
    assert long_steps(run.store()) is not None
    assert long_steps(measured(quiet(), np.where(STEPS < 270, 0.02, 0.004)).store()) is None
    fading = measured(quiet(), 0.02 * np.sqrt(200 / (STEPS + 1)))
    assert long_steps(fading.store()) is not None
    fading.rate = np.minimum((STEPS + 1) / 20, np.sqrt(20 / (STEPS + 1)))
    assert long_steps(fading.store()) is None


@pytest.mark.parametrize("ramp", [10, 20])
def test_a_wild_start_at_an_early_peak_is_a_short_warm_up_though_the_loss_never_fell(ramp):
    run = measured(quiet(), np.where(STEPS < 30, 0.2, 0.004))
    run.rate = np.minimum((STEPS + 1) / ramp, np.sqrt(ramp / (STEPS + 1)))
    assert passed_early_peak(run.store())
    ranked = named(run)
    assert max(ranked, key=ranked.get) == "warmup_too_short"
    assert ranked["lr_too_high"] > 0.02


@pytest.mark.parametrize(
    "rate",
    [
        np.ones(400),
        np.minimum((STEPS + 1) / 40, 1.0),
        0.6 + 0.4 * np.cos(np.pi * STEPS / 400),
        np.where(STEPS < 200, 0.1, 1.0),
    ],
    ids=["steady", "a warm-up that stays up", "cosine", "a jump"],
)
def test_other_courses_have_no_early_peak(rate):
    run = quiet()
    run.rate = rate
    assert not passed_early_peak(run.store())


def test_a_wild_start_is_a_short_warm_up_if_the_loss_falls_on_and_else_a_rate_too_high():
    share, norm = np.where(STEPS < 30, 0.2, 0.004), np.where(STEPS < 30, 10.0, 40.0)
    run = measured(quiet(), share, norm)
    wild = oversized_first_updates(run.store())
    assert wild is not None
    assert (wild.share, wild.after.ordinal, wild.before, wild.grown) == (pytest.approx(0.2), 21, 10.0, 40.0)
    assert not keeps_falling(run.store())
    assert max(named(run), key=named(run).get) == "lr_too_high"
    run.loss *= np.exp(-STEPS / 100)
    assert keeps_falling(run.store())
    assert max(named(run), key=named(run).get) == "warmup_too_short"


def test_a_large_embedding_does_not_hide_what_becomes_of_the_other_layers():
    run = measured(quiet(), np.full(400, 0.01))
    names, weights = ("embedding.weight", "head.weight", "head.bias"), ("embedding.weight", "head.weight")
    run.layers["weight_norm"] = (names, {t: [40.0, 2.0, 0.0] for t in range(0, 64, 10)})
    run.layers["update_norm"] = (names, {t: [0.4, 0.5 if t < 30 else 0.02, 0.1] for t in range(0, 64, 10)})
    assert oversized_first_updates(run.store()) is None
    run.layers["initial_scale"] = (weights, {0: [1.0, 1.0]})
    wild = oversized_first_updates(run.store())
    assert wild is not None
    assert (wild.share, wild.after.ordinal) == (pytest.approx((0.01 + 0.25) / 2), 21)


def test_runs_whose_updates_were_not_measured_say_nothing():
    run = quiet()
    assert long_steps(run.store()) is None
    assert oversized_first_updates(run.store()) is None
    assert not lengthened(run.store(), 200)


# -- by experiment
# -------------------------------------------------------------------------------------------------------


def test_what_the_lab_found_of_a_run_without_an_episode_is_told():
    run = quiet()
    steps = StepSize(rho=0.3, worsened=0.3, against=0.0, overshot=0.3, updates=24, source="present")
    run.note(StepSizeTest(at=moment(255), result=steps))
    assert max(named(run), key=named(run).get) == "lr_too_high"


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed):
    run = measured(quiet(seed), np.full(400, 0.003))
    assert named(run) == {}


def test_a_restart_that_comes_back_to_its_old_peak_may_lift_the_loss_for_a_while():
    run = quiet()
    run.restarts(200, peak=0.1)
    run.loss[205:] *= 1.6
    assert named(run) == {}
    run.rate[200:] *= 5.0
    assert max(named(run), key=named(run).get) in {"lr_restart", "lr_scheduler_fault"}


def test_a_wild_start_that_was_borne_is_not_told_beside_other_trouble():
    share, norm = np.where(STEPS < 30, 0.2, 0.004), np.where(STEPS < 30, 10.0, 40.0)
    run = measured(quiet(), share, norm)
    run.loss *= np.exp(-STEPS / 100)
    assert "warmup_too_short" in named(run)
    run.episodes = [an_episode(300, 310, None, kind=EpisodeKind.OVERFIT, severity=2.0)]
    assert "warmup_too_short" not in named(run)
