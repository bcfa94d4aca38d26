"""The clipping as a factor: by itself, and in a training whose clipping was switched off."""

import dataclasses

import pytest
import torch
from lab.episodes import LATE, At, examined, first, measured
from lab.made import around, leg, settings
from lightning.pytorch import Callback
from training_tasks import Digits

from lightning_spike.lab.experiments.factors import Clipping
from lightning_spike.record.update_settings import CLIP

USUAL, OFF = (1.0, "norm"), (None, None)


def clipped(step, clip):
    return [{**group, CLIP: clip} for group in step]


def update(clip):
    return dataclasses.replace(leg(9).update, settings=(clipped(settings(0.1), clip),))


def test_what_was_switched_off_is_switched_on_again():
    normal = Clipping().normal(update(OFF), around([leg(9)], before=[clipped(settings(0.1), USUAL)] * 8))
    assert normal.settings[0][0] == {**settings(0.1)[0], CLIP: USUAL}


@pytest.mark.parametrize(
    ("now", "before"),
    [
        pytest.param(USUAL, [clipped(settings(0.1), USUAL)] * 8, id="as-it-was"),
        pytest.param(OFF, [clipped(settings(0.1), USUAL)] * 3, id="too-few"),
        pytest.param(OFF, [settings(0.1)] * 8, id="not-noted"),
        pytest.param(OFF, [clipped(settings(0.1, place=1), USUAL)] * 8, id="another-optimizer"),
    ],
)
def test_it_is_no_factor(now, before):
    assert Clipping().normal(update(now), around([leg(9)], before=before)) is None


class Unclipped(Callback):
    """Takes the clipping away before one batch."""

    def __init__(self, at):
        self.at, self.count = at, -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == self.at:
            trainer.gradient_clip_val = None


class LargeGradients(Digits):
    """A gradient that is a thousand times too large is clipped throughout; the loss is as ever."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss.detach() + 1000 * (loss - loss.detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_run_whose_clipping_was_switched_off_comes_out_again_and_the_clipping_is_to_blame(tmp_path):
    trainer = examined(lambda: LargeGradients(0.02), tmp_path, Unclipped(LATE - 1), gradient_clip_val=1.0)
    found = measured(trainer)
    assert found.replay.exact
    assert found.attribution.shares[0].factor == "clipping"
    assert found.attribution.shares[0].share > 0.8
    assert first(trainer) == "clipping"
    assert trainer.gradient_clip_val is None


def test_a_clipping_that_is_as_ever_is_not_to_blame(tmp_path):
    def high_rate(trainer, module, optimizer):
        optimizer.param_groups[0]["lr"] *= 400

    trainer = examined(lambda: Digits(0.003), tmp_path, At(LATE - 1, end=high_rate), gradient_clip_val=10.0)
    assert "clipping" in measured(trainer).attribution.at_baseline
    assert first(trainer) == "learning_rate"
