"""The search for the update that did the damage, on states of which it is known where they got worse."""

import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.made import entry, leg, moment
from lab.shapes import CLASSES, FEATURES, Plain

from lightning_spike.lab.experiments.damage_location import damage_on_the_way
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

UPDATES = 12
SHIFT = torch.tensor([8.0, 0.0, -8.0])
"""Added to the last bias times a share: the wrong class for most samples."""


def controls():
    generator = torch.Generator().manual_seed(0)
    return [
        entry(k, [torch.randn(16, FEATURES, generator=generator), torch.randint(CLASSES, (16,), generator=generator)])
        for k in range(4)
    ]


def reproduction(module, damage):
    """States that are as bad as `damage` says, from 0 to 1, one more than there are updates."""
    plain = copy_module(module)

    def state(k):
        weights = {n: t.clone() for n, t in plain.items()}
        weights["net.2.bias"] += SHIFT * damage[k]
        return TrainState(at=moment(20 + k), weights=weights, optimizers=[])

    updates_replayed = tuple(leg(20 + k, state(k)) for k in range(UPDATES))
    end = state(UPDATES)
    return Reproduction(updates_replayed=updates_replayed, end=end, reached=32, steps=12, differs_at=None, replayed=1.0)


def found(damage):
    torch.manual_seed(0)
    module = Plain()
    trainer = attached(module)
    with isolated(trainer, module) as sandbox:
        return damage_on_the_way(sandbox, reproduction(module, damage), controls(), like=entry(32))


@pytest.mark.parametrize("at", [0, 4, 11])
def test_a_single_blow_is_found_wherever_it_is(at):
    damage = found([float(k > at) for k in range(UPDATES + 1)])
    assert (damage.first, damage.last) == (at, at)
    assert damage.share == pytest.approx(1.0)
    assert (damage.after > damage.before).all()


def test_damage_of_three_updates_is_laid_to_the_three():
    damage = found([min(max(k - 4, 0), 3) / 3 for k in range(UPDATES + 1)])
    assert 4 <= damage.first <= damage.last <= 6
    assert damage.last - damage.first >= 1
    assert damage.share >= 0.7


@pytest.mark.parametrize("from_", [0, 2, 4])
def test_of_a_long_row_the_four_that_do_most_are_taken(from_):
    """Eight updates of which the last four do twice as much each."""
    course = [0.0, *np.cumsum([1, 1, 1, 1, 2, 2, 2, 2]) / 12]
    damage = found([course[min(max(k - from_, 0), 8)] for k in range(UPDATES + 1)])
    assert damage.last - damage.first == 3
    assert damage.first >= from_ + 2
    assert 0.4 < damage.share < 1.0


@pytest.mark.parametrize("at", [0, 3, 11])
def test_the_search_evaluates_fewer_states_than_there_are(at):
    torch.manual_seed(0)
    module = Plain()
    with isolated(attached(module), module) as sandbox:
        courses = reproduction(module, [min(max(k - at, 0), 3) / 3 for k in range(UPDATES + 1)])
        damage_on_the_way(sandbox, courses, controls(), like=entry(32))
        assert sandbox.steps <= 9 * len(controls())


def test_a_longer_step_that_does_no_harm_is_not_taken_for_it():
    """A shift of all classes alike is the longest step, and changes no loss."""
    torch.manual_seed(0)
    module = Plain()
    trainer = attached(module)
    again = reproduction(module, [float(k > 3) for k in range(UPDATES + 1)])
    for k, state in enumerate([*(made.before for made in again.updates_replayed), again.end]):
        state.weights["net.2.bias"] += 1000.0 * (k > 8)
    with isolated(trainer, module) as sandbox:
        damage = damage_on_the_way(sandbox, again, controls(), like=entry(32))
    assert (damage.first, damage.last) == (3, 3)


def test_without_updates_there_is_none():
    module = Plain()
    end = TrainState(at=moment(3), weights=copy_module(module), optimizers=[])
    again = Reproduction(updates_replayed=(), end=end, reached=3, steps=0, differs_at=None, replayed=1.0)
    with isolated(attached(module), module) as sandbox:
        assert damage_on_the_way(sandbox, again, controls(), like=entry(3)) is None
