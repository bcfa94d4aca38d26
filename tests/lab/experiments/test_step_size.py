"""Steps that keep the promise of their gradient and steps that do not, on a parabola where both are known."""

import pytest
import torch
from lab.attached import attached
from lab.made import entry, moment, settings
from lightning.pytorch import LightningModule

from lightning_spike.diagnosis.judgement import p_chronic
from lightning_spike.lab.experiments.step_size import step_size
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update, UpdateOutcome
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

CURVATURE = 4.0


class Parabola(LightningModule):
    """loss = curvature / 2 * w^2, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return CURVATURE / 2 * self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return [torch.zeros(1)] * 3


def descent(rate, steps=8):
    """The updates of plain gradient descent, by hand."""
    updates_replayed, w = [], 1.0
    for k in range(steps):
        state = TrainState(at=moment(k), weights={"weight": torch.tensor([w])}, optimizers=[])
        made = UpdateOutcome(
            losses=(CURVATURE / 2 * w * w,), gradients={"weight": torch.tensor([CURVATURE * w])}, spoilt_at=None
        )
        update = Update(entries=(entry(k, torch.zeros(1)),), settings=(settings(rate),))
        updates_replayed.append(ReplayedUpdate(before=state, update=update, made=made))
        w -= rate * CURVATURE * w
    end = TrainState(at=moment(steps), weights={"weight": torch.tensor([w])}, optimizers=[])
    return updates_replayed, end


def told(rate, **options):
    module = Parabola()
    with isolated(attached(module), module) as sandbox:
        return step_size(sandbox, *descent(rate, **options))


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.45, 0.6])
def test_rho_is_one_less_half_of_rate_times_curvature(rate):
    """dL = -rate g^2 (1 - rate curvature / 2): below 0 exactly beyond 2 / curvature."""
    found = told(rate)
    assert found.rho == pytest.approx(1 - rate * CURVATURE / 2, abs=1e-3)
    assert found.worsened == float(rate > 2 / CURVATURE)
    assert found.against == 0.0


def test_steps_beyond_the_edge_are_called_too_long_all_the_time():
    assert p_chronic(told(0.6)) > 0.99
    assert p_chronic(told(0.02)) < 0.05


def test_few_updates_say_nothing():
    assert told(0.1, steps=3) is None


def test_steps_that_keep_little_of_their_promise_are_suspected_though_none_worsened_its_batch():
    """The ratio is 0.8, 0.6 and 0.2."""
    ordinary, long, longer = (told(rate) for rate in (0.1, 0.2, 0.4))
    assert [found.worsened for found in (ordinary, long, longer)] == [0.0, 0.0, 0.0]
    assert p_chronic(ordinary) < 0.1
    assert p_chronic(ordinary) < p_chronic(long) < p_chronic(longer)
    assert p_chronic(longer) > 0.8
