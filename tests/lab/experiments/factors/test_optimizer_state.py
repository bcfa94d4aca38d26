"""The optimizer's memory as factors; second moments against what Adam would have had from the same gradients."""

import pytest
import torch
from lab.made import adam_state, around, leg

from lightning_spike.lab.experiments.factors import Momentum, OptimizerState, SecondMoments

BETA = 0.999
STEPS = 10
OLD = 5000


def second_moment(then, squares):
    for square in squares:
        then = BETA * then + (1 - BETA) * square
    return then


def updates_replayed(*, squares, m=(0.0, 0.0)):
    """A dozen updates; the second moment has stood at 1 for long, and then the gradients were of these squared
    sizes."""
    filled = 1 - BETA**OLD
    first = adam_state(OLD, v=filled, m=m[0])
    last = adam_state(OLD + STEPS, v=second_moment(filled, squares), m=m[1])
    return [leg(OLD, first), *(leg(OLD + k) for k in range(1, STEPS)), leg(OLD + STEPS, last)]


def held(update, key):
    return update.optimizers[0]["state"][0][key]


def test_second_moments_that_have_kept_up_are_no_factor():
    run = updates_replayed(squares=[1.0] * STEPS)
    assert SecondMoments().normal(run[-1].update, around(run)) is None


def test_stale_ones_are_put_to_the_size_of_the_recent_gradients():
    run = updates_replayed(squares=[400.0] * STEPS)
    normal = SecondMoments().normal(run[-1].update, around(run))
    filled = 1 - BETA ** (OLD + STEPS)
    assert (held(normal, "exp_avg_sq") / filled).tolist() == pytest.approx([400.0] * 4, rel=0.01)
    assert torch.equal(held(normal, "exp_avg"), run[-1].before.optimizers[0]["state"][0]["exp_avg"])


def test_young_ones_are_corrected_for_their_beginning_as_adam_does():
    """After 20 steps of equal gradients Adam's v is 2 % of their square: that is not stale."""
    young = [leg(k, adam_state(k, v=1 - BETA**k)) for k in range(10, 21)]
    assert SecondMoments().normal(young[-1].update, around(young)) is None


def test_momentum_is_put_back_to_that_of_the_oldest_update():
    run = updates_replayed(squares=[1.0] * STEPS, m=(0.5, -30.0))
    normal = Momentum().normal(run[-1].update, around(run))
    assert held(normal, "exp_avg").tolist() == [0.5] * 4


def test_both_together():
    run = updates_replayed(squares=[400.0] * STEPS, m=(0.5, -30.0))
    normal = OptimizerState().normal(run[-1].update, around(run))
    assert held(normal, "exp_avg").tolist() == [0.5] * 4
    assert float(held(normal, "exp_avg_sq")[0]) > 300.0


def test_with_nothing_remembered_from_before_there_is_nothing_to_put_back():
    alone = [leg(3)]
    assert OptimizerState().normal(alone[0].update, around(alone)) is None
