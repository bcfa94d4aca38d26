"""The batch under cooled-down weights, against a training loop written out by hand."""

import copy
import math

import pytest
import torch
from lab.attached import attached
from lab.made import moment
from lightning.pytorch import LightningModule
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from lightning_spike.experiments import Cooldown
from lightning_spike.lab.experiments.cooldown_test import COOLDOWN_RATE, cooldown_test
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update, UpdateOutcome
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import settings_of
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState
from lightning_spike.signals.random_state import RandomState

RATE, MOMENTUM, STEPS = 0.2, 0.9, 5


class Line(LightningModule):
    """A regression with nothing random in it."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.line(x), y)

    def train_dataloader(self):
        return batches(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=MOMENTUM)


def batches(count, shift=0.0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 8, 3, generator=generator)
    y = x.sum(2, keepdim=True) + 0.1 * torch.randn(count, 8, 1, generator=generator)
    return [(a, b + shift) for a, b in zip(x, y, strict=True)]


def entry(ordinal, batch):
    return RingEntry(at=moment(ordinal), batch=batch, ids=None, rng=RandomState.take())


def by_hand(module, trained_on, looked_at):
    """The losses after the same steps with a tenth of the rate, in plain torch."""
    line, velocity = copy.deepcopy(module.line), [torch.zeros_like(p) for p in module.line.parameters()]
    for x, y in trained_on:
        gradients = torch.autograd.grad(F.mse_loss(line(x), y), list(line.parameters()))
        with torch.no_grad():
            for parameter, moving, gradient in zip(line.parameters(), velocity, gradients, strict=True):
                moving.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(moving, alpha=RATE / 10)
    return [float(F.mse_loss(line(x), y).detach()) for x, y in looked_at]


def made(spike, excess):
    torch.manual_seed(0)
    module = Line()
    trainer = attached(module)
    trained_on, controls = batches(STEPS), batches(STEPS + 4)[STEPS:]
    weights = copy.deepcopy(module.state_dict())
    with isolated(trainer, module, with_optimizers=True) as sandbox:
        start = TrainState.take(sandbox, moment(0))
        settings = settings_of(trainer.optimizers[0])
        updates_replayed = [
            ReplayedUpdate(
                before=start,
                update=Update(entries=(entry(k, batch),), settings=(settings,)),
                made=UpdateOutcome(losses=(1.0,), gradients={}, spoilt_at=None),
            )
            for k, batch in enumerate(trained_on)
        ]
        ordinary = [entry(k, batch) for k, batch in enumerate(controls, STEPS)]
        found = cooldown_test(sandbox, updates_replayed, entry(9, spike), ordinary, excess=excess)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    return found, by_hand(module, trained_on, [spike, *controls])


def test_the_excess_is_that_of_the_weights_after_the_same_steps_with_a_tenth_of_the_rate():
    assert COOLDOWN_RATE == 0.1
    found, (spike, *controls) = made(batches(10, shift=3.0)[9], excess=2.0)
    expected = math.log(spike) - sum(map(math.log, controls)) / len(controls)
    assert found.after == pytest.approx(expected, rel=1e-4)
    assert (found.before, found.steps) == (2.0, STEPS)


def test_a_batch_with_wrong_targets_still_stands_out_and_an_ordinary_one_does_not():
    wrong, _ = made(batches(10, shift=3.0)[9], excess=1.0)
    ordinary, _ = made(batches(10)[9], excess=1.0)
    assert ordinary.left < 0.5 < wrong.left


def test_without_updates_nothing_is_said():
    with isolated(attached(module := Line()), module, with_optimizers=True) as sandbox:
        assert cooldown_test(sandbox, [], entry(0, batches(1)[0]), [entry(1, batches(1)[0])], excess=1.0) is None


@pytest.mark.parametrize(
    ("before", "after", "left"), [(2.0, 1.0, 0.5), (2.0, 3.0, 1.0), (2.0, -1.0, 0.0), (0.0, 1.0, 1.0)]
)
def test_what_is_left_is_a_share(before, after, left):
    assert Cooldown(before=before, after=after, steps=1).left == left
