import pytest
import torch
from lab.attached import attached
from lab.measure.entries import entry
from lab.shapes import CLASSES, FEATURES, Plain
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import functional

from lightning_spike.lab.measure.measure import measure_loss_scale, measure_precision
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import isolated


class Fragile(Plain):
    """Its loss grows with what bfloat16 leaves of a difference."""

    fragile = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        offset = torch.nn.functional.linear(torch.full((1, 1), 256.0), torch.ones(1, 1)) + 1.0
        return loss + 10 * (offset.float() - 257.0).abs().sum() if self.fragile else loss


def measured(precision, *, fragile=False):
    torch.manual_seed(4)
    module = Fragile()
    module.fragile = fragile
    trainer = Trainer(
        accelerator="cpu", precision=precision, max_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    module.train()
    batch = [torch.randn(16, FEATURES), torch.arange(16) % CLASSES]
    with isolated(trainer, module) as sandbox:
        found = measure_precision(sandbox, copy_module(module), entry(batch))
        return found, module, batch, sandbox.steps


def test_nothing_without_autocast():
    found, _, _, passes = measured("32-true")
    assert found is None
    assert passes == 0


def test_both_losses_are_those_of_torch():
    found, module, (x, y), _ = measured("bf16-mixed")
    assert found.float32 == pytest.approx(functional.cross_entropy(module.net(x), y).item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = functional.cross_entropy(module.net(x), y).item()
    assert found.low == pytest.approx(low, rel=1e-6)
    assert found.low != found.float32
    assert found.low == pytest.approx(found.float32, rel=0.05)


def test_a_loss_that_low_precision_makes():
    found, _, _, _ = measured("bf16-mixed", fragile=True)
    assert found.low > found.float32 + 5


def scaled_to(scale):
    trainer = attached(Plain())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return trainer


@pytest.mark.parametrize(("before", "now"), [(1024.0, 256.0), (1024.0, 1024.0), (512.0, 1024.0), (4.0, 0.25)])
def test_the_loss_scale_is_the_scalers(before, now):
    found = measure_loss_scale(scaled_to(now), {"scale": torch.tensor(before)})
    assert (found.before, found.now) == (before, now)


def test_there_is_no_loss_scale_without_a_scaler_or_before_its_first_loss():
    assert measure_loss_scale(attached(Plain()), None) is None
    assert measure_loss_scale(scaled_to(8.0), {"scale": None}) is None
