"""The steps of the present: too long on a valley that they jump across, and right on one where they are short."""

import math

import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.made import entry, settings
from lightning.pytorch import LightningModule

from lightning_spike.diagnosis.judgement import steps_too_long, steps_too_long_in_quiet_run
from lightning_spike.errors import CannotReplay
from lightning_spike.lab.experiments.step_size_test import TESTED_UPDATES as UPDATES
from lightning_spike.lab.experiments.step_size_test import step_size_test


class Valley(LightningModule):
    """loss = sqrt((w - batch)^2 + 0.01): a gradient of about 1 on either side, so steps of `rate`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3]))

    def training_step(self, batch, batch_idx):
        return ((self.weight - batch).square() + 0.01).sqrt().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return [torch.zeros(1)] * 3


def looked_at(rate, *, start=0.3, batches=UPDATES + 1, target=0.0):
    module = Valley()
    trainer = attached(module)
    with torch.no_grad():
        module.weight.fill_(start)
    entries = [entry(k, torch.full((1,), target)) for k in range(batches)]
    before = torch.get_rng_state()
    steps = step_size_test(trainer, module, entries, {k: [settings(rate)] for k in range(batches)})
    assert module.weight.item() == pytest.approx(start)
    assert module.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    return steps


def by_hand(rate, start=0.3):
    """The same descent in plain arithmetic: of each update the change of its loss and the promise of its gradient."""
    w, kept = start, []
    for _ in range(UPDATES):
        loss, gradient = math.sqrt(w * w + 0.01), w / math.sqrt(w * w + 0.01)
        step = -rate * gradient
        w += step
        kept.append((math.sqrt(w * w + 0.01) - loss, gradient * step))
    return kept


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
def test_it_makes_the_updates_from_the_present_weights_on(rate):
    steps, kept = looked_at(rate), by_hand(rate)
    assert steps.updates == UPDATES
    assert steps.rho == pytest.approx(np.median([change / promise for change, promise in kept]), abs=1e-3)
    assert steps.overshot == pytest.approx(np.mean([change > 1e-7 for change, _ in kept]), abs=1 / UPDATES)


def test_steps_across_the_valley_are_too_long_and_short_ones_are_not():
    assert steps_too_long(looked_at(1.0, start=0.4))
    assert not steps_too_long(looked_at(0.01, start=1.0))


def test_too_few_updates_say_nothing():
    assert looked_at(0.1, batches=4) is None


def test_a_gradient_that_is_not_finite_says_nothing():
    assert looked_at(0.1, target=math.nan) is None


def test_a_gradient_that_promises_nothing_says_nothing():
    """Far out in a loss of 1e6 a step of 1e-9 changes less than rounding does."""
    assert looked_at(1e-9, start=1e6) is None


def test_steps_across_the_valley_are_named_without_an_episode_too():
    assert steps_too_long_in_quiet_run(looked_at(1.0, start=0.4))
    assert not steps_too_long_in_quiet_run(looked_at(0.01, start=1.0))


def test_a_batch_that_was_changed_in_place_is_refused():
    module = Valley()
    entries = [entry(k, torch.zeros(1)) for k in range(8)]
    changed = [type(e)(at=e.at, batch=e.batch, ids=e.ids, rng=e.rng, mutated=True) for e in entries]
    with pytest.raises(CannotReplay, match="in place"):
        step_size_test(attached(module), module, changed, {k: [settings(0.1)] for k in range(8)})
