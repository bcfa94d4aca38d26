"""Two states against each other, tensor by tensor."""

import math

import torch

from lightning_spike.lab.replay.compare import differences
from lightning_spike.records import Moment
from lightning_spike.sandbox.state import TrainState

AT = Moment(ordinal=3, step=3, epoch=0, batch_idx=3)


def state(**changes):
    weights = {"net.weight": torch.ones(4), "net.bias": torch.zeros(2), "count": torch.tensor(3)}
    moments = {"exp_avg": torch.full((4,), 2.0), "step": torch.tensor(1.0)}
    for name, value in changes.items():
        (weights if name in weights else moments)[name] = value
    return TrainState(at=AT, weights=weights, optimizers=[{"state": {0: moments}, "param_groups": []}])


def test_the_same_states_do_not_differ():
    assert differences(state(), state()) == ()


def test_what_differs_is_named_with_its_size_the_most_different_first():
    found = differences(state(exp_avg=torch.full((4,), 8.0), **{"net.weight": torch.full((4,), 1.5)}), state())
    assert [(d.name, d.kind, d.relative) for d in found] == [
        ("0.0.exp_avg", "optimizer", 3.0),
        ("net.weight", "weights", 0.5),
    ]


def test_what_was_zero_or_is_not_finite_is_infinitely_different():
    changed = {"net.bias": torch.tensor([0.0, 1.0]), "net.weight": torch.full((4,), math.nan), "count": torch.tensor(4)}
    assert [d.relative for d in differences(state(**changed), state())] == [math.inf] * 3


def test_elements_that_are_others_are_counted_apart_from_rounding():
    before = torch.tensor([0.5, -0.25, 0.125, 1.0, 0.0625, 0.3])
    after = before * torch.tensor([16.0, 1.0 + 1e-5, -1.0, 1.5, 2.0**-4, 1.0 - 1e-6])
    (found,) = differences(state(**{"net.weight": after}), state(**{"net.weight": before}))
    assert (found.elements, found.changed, found.powers_of_two) == (6, 4, 3)


def test_a_weight_whose_highest_exponent_bit_has_flipped_is_a_power_of_two_times_as_large():
    before = torch.tensor([0.5, -0.25, 0.125, 1.0])
    after = before.clone()
    after.view(torch.int32)[1] ^= 1 << 30
    (found,) = differences(state(**{"net.weight": after}), state(**{"net.weight": before}))
    assert (found.changed, found.powers_of_two) == (1, 1)
