import pytest
import torch
from lab.attached import attached
from lab.shapes import Plain
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_spike.lab.measure.loss_scale import measure_loss_scale


def scaled_to(scale):
    trainer = attached(Plain())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return trainer


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [(1024.0, 256.0, "overflowed"), (1024.0, 1024.0, "nothing has"), (512.0, 1024.0, "grown"), (4.0, 0.25, "so low")],
)
def test_it_is_the_scalers(before, now, words):
    found = measure_loss_scale(scaled_to(now), {"scale": torch.tensor(before)})
    assert (found.before, found.now) == (before, now)
    assert words in found.text


def test_none_without_a_scaler_or_before_its_first_loss():
    assert measure_loss_scale(attached(Plain()), None) is None
    assert measure_loss_scale(scaled_to(8.0), {"scale": None}) is None
