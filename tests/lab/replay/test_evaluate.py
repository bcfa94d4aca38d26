"""Losses under given weights: of the same thing for all, and on the scale on which they are compared."""

import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.shapes import CLASSES, FEATURES, NormAndDropout, Plain
from torch.nn import functional

from lightning_spike.lab.replay.evaluate import MAX_LOSS, log_scale, losses_under
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import copy_module
from lightning_spike.records import Moment
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.signals.random_state import RandomState


def entries(count):
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        batch = [
            torch.randn(5, FEATURES, generator=generator),
            torch.randint(CLASSES, (5,), generator=generator),
        ]
        at = Moment(ordinal=k, step=k, epoch=0, batch_idx=k)
        yield RingEntry(at=at, batch=batch, ids=None, rng=RandomState.take())


class Penalty(Plain):
    """Differentiates its input in the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch[0].clone().requires_grad_(), batch[1]
        loss = functional.cross_entropy(self.net(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()


@pytest.mark.parametrize("make", [Plain, Penalty])
def test_they_are_those_of_the_step_under_these_weights(make):
    module = make()
    batches = list(entries(3))
    with isolated(attached(module), module) as sandbox:
        weights = {name: tensor * 0.5 for name, tensor in copy_module(module).items()}
        found = losses_under(sandbox, weights, batches, like=batches[0])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    expected = [float(module.training_step(entry.batch, 0).detach()) for entry in batches]
    assert found.tolist() == pytest.approx(expected)


def test_every_batch_meets_the_same_dropout_and_leaves_nothing_to_the_next():
    module = NormAndDropout()
    one = next(iter(entries(1)))
    with isolated(attached(module), module) as sandbox:
        weights = copy_module(module)
        found = losses_under(sandbox, weights, [one, one, one], like=one)
    assert len(set(found.tolist())) == 1


def test_logarithms_where_all_are_positive_and_the_highest_for_what_is_not_finite():
    losses = np.array([1.0, np.e, np.nan, np.inf, 1e9])
    assert log_scale(losses)(losses) == pytest.approx([0.0, 1.0, *[np.log(MAX_LOSS)] * 3])
    signed = np.array([-1.0, 2.0])
    assert log_scale(signed, losses)(signed).tolist() == [-1.0, 2.0]


def test_under_weights_that_are_held_a_loss_is_computed_once():
    module = Plain()
    batches = list(entries(3))
    with isolated(attached(module), module) as sandbox:
        weights = copy_module(module)
        other = {name: tensor * 0.5 for name, tensor in weights.items()}
        first = losses_under(sandbox, weights, batches[:2], like=batches[0], held=True)
        assert sandbox.steps == 2
        again = losses_under(sandbox, weights, batches, like=batches[0], held=True)
        assert sandbox.steps == 3
        assert again[:2].tolist() == first.tolist()
        losses_under(sandbox, weights, batches[:1], like=batches[1], held=True)
        elsewhere = losses_under(sandbox, other, batches[:2], like=batches[0], held=True)
        assert sandbox.steps == 6
        assert (
            elsewhere.tolist() == losses_under(sandbox, other, batches[:2], like=batches[0]).tolist() != first.tolist()
        )
