"""The split of a jump, on losses of which it is known what made them."""

import math

import numpy as np
import pytest

from lightning_spike.diagnosis.judgement import verdict_of
from lightning_spike.lab.experiments.split import batch_noise, split_losses

USUAL = np.array([1.0, 1.1, 0.95, 1.02, 0.9, 1.05, 0.98, 1.0])


def losses(batch, controls):
    return np.array([batch, *controls])


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        pytest.param(losses(20, USUAL), losses(20, USUAL * 0.98), "data", id="bad-batch"),
        pytest.param(losses(1, USUAL), losses(20, USUAL * 21), "weights", id="bad-weights"),
        pytest.param(losses(1, USUAL), losses(20, USUAL), "both", id="interaction"),
        pytest.param(losses(6, USUAL), losses(36, USUAL * 6), "both", id="two-causes"),
        pytest.param(losses(1.1, USUAL), losses(1.15, USUAL), "noise", id="nothing"),
        pytest.param(losses(1, USUAL), losses(2, USUAL * 2), "weights", id="weights-within-the-scatter"),
        pytest.param(losses(math.nan, USUAL), losses(math.inf, USUAL), "data", id="not-finite"),
        pytest.param(losses(-1, USUAL - 5), losses(-1, USUAL - 5), "data", id="negative-losses"),
    ],
)
def test_the_verdict(old, new, verdict):
    assert verdict_of(split_losses(old, new, scatter=0.3 if verdict == "weights" else 0.06)) == verdict


def test_ordinary_batches_that_are_worse_under_the_very_weights_of_before_are_the_computations_doing():
    """A loss that is multiplied by 30 from now on: batch, weights and all are as before."""
    trained = np.array([0.9, 1.1, 1.0, 0.95])
    parts = split_losses(losses(33, 30 * trained), losses(31, 29 * trained), scatter=0.06, recorded=trained)
    assert verdict_of(parts) == "computation"
    assert parts.computation == pytest.approx(math.log(30) / (math.log(31) - np.log(trained).mean()))
    assert parts.batch_part + parts.weights_part < 0.05


@pytest.mark.parametrize(
    "trained", [np.array([1.3, 0.8, 0.9, 1.2]), np.array([1.0, math.nan, math.nan, math.nan]), None], ids=str
)
def test_ordinary_batches_with_about_the_loss_of_before_or_none_that_is_known_say_nothing_of_it(trained):
    now = np.array([1.2, 0.85, 0.8, 1.25])
    parts = split_losses(losses(20, now), losses(20, now), scatter=0.1, recorded=trained)
    assert (verdict_of(parts), parts.computation) == ("data", 0.0)


def test_a_bad_batch_in_a_loss_that_has_doubled_is_still_the_batchs():
    trained = np.ones(4)
    parts = split_losses(losses(200, 2 * trained), losses(200, 2 * trained), scatter=0.05, recorded=trained)
    assert verdict_of(parts) == "data"
    assert 0.05 < parts.computation < 0.2


def test_the_shares_are_those_of_the_log_losses():
    parts = split_losses(losses(4, [1, 1, 1]), losses(32, [8, 8, 8]), scatter=0.0)
    assert parts.jump == pytest.approx(math.log(32))
    assert parts.data_effect / parts.jump == pytest.approx(math.log(4) / math.log(32))
    assert parts.weights_effect / parts.jump == pytest.approx(math.log(8) / math.log(32))
    assert parts.interaction_effect / parts.jump == pytest.approx(0.0, abs=1e-12)
    assert parts.data == pytest.approx(math.log(4) / math.log(32))
    assert parts.weights == pytest.approx(math.log(8) / math.log(32))
    assert parts.interaction == pytest.approx(0.0, abs=1e-12)


def test_a_batch_picked_for_its_loss_is_not_blamed_for_its_luck():
    """The highest of 50 ordinary batches, and weights that got worse by as much as its luck.

    Without taking the selection off, the batch would be named.
    """
    rng = np.random.default_rng(0)
    blamed = 0
    for _ in range(200):
        picked = math.exp(np.max(rng.normal(0, 0.3, 50)))
        controls = np.exp(rng.normal(0, 0.3, 8))
        parts = split_losses(losses(picked, controls), losses(picked * 3, controls * 3), scatter=0.3)
        blamed += verdict_of(parts) == "data"
    assert blamed <= 4


def test_damage_seen_only_after_the_batch_is_not_held_against_it_twice():
    """The batch makes the whole jump, and its update has ruined the weights since."""
    parts = split_losses(losses(20, USUAL), losses(20, USUAL * 50), scatter=0.06, is_later=True)
    assert verdict_of(parts) == "data"
    assert verdict_of(split_losses(losses(20, USUAL), losses(20, USUAL * 50), scatter=0.06)) != "data"


def test_lasting_damage_is_seen_with_later_weights_where_the_batch_is_ordinary():
    assert verdict_of(split_losses(losses(1, USUAL), losses(20, USUAL * 15), scatter=0.06, is_later=True)) == "weights"


def test_the_scatter_is_that_of_the_noise_whatever_the_trend_and_the_spikes():
    rng = np.random.default_rng(1)
    noise = np.exp(rng.normal(0, 0.2, 400))
    trend = np.exp(-np.arange(400) / 100)
    spiked = np.where(np.arange(400) % 40 == 7, 1000.0, 1.0)
    assert batch_noise(noise * trend * spiked) == pytest.approx(0.2, rel=0.25)


def test_two_losses_have_no_scatter():
    assert batch_noise(np.array([1.0, 2.0])) == 0.0
