"""The scale and the skipped updates against what the scaler itself says; nothing at all in float32."""

import numpy as np
import pytest
import torch
from callbacks.watching import recorded, store_of, watched
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from training_tasks import Digits

from lightning_spike import PrecisionMonitor
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import LossScaleHeldDown, LossScaleJumps

OURS = {"loss_scale", "skipped_step", "grad_zeros", "grad_underflow"}


class Reference(Callback):
    """The scale before each update, and whether a gradient was not finite."""

    def __init__(self):
        self.scales, self.skips = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.skips.append(not all(bool(p.grad.isfinite().all()) for p in pl_module.parameters()))


def half(callbacks, root, init_scale=2.0**10, **options):
    torch.manual_seed(0)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))
    return store_of(Digits(), callbacks, root, plugins=[plugin], **options)


def test_scale_and_skips_are_those_of_the_scaler(tmp_path):
    reference = Reference()
    store = half([LossScaleJumps.mild(at=20, strength=2.0**40), PrecisionMonitor(), reference], tmp_path)
    np.testing.assert_allclose(recorded(store, "loss_scale"), reference.scales)
    np.testing.assert_array_equal(recorded(store, "skipped_step"), reference.skips)
    assert sum(reference.skips) > 5
    assert not any(reference.skips[:20])


def test_a_scale_held_down_makes_gradients_underflow(tmp_path):
    store = half([LossScaleHeldDown.mild(at=16), PrecisionMonitor(every=4)], tmp_path, max_epochs=1)
    zeros, below = recorded(store, "grad_zeros"), recorded(store, "grad_underflow")
    assert len(zeros) == 8
    lost = zeros + below
    assert lost[:4].max() < 0.3
    assert lost[4:].min() > 0.8


def test_bfloat16_has_no_scale(tmp_path):
    store = watched("cnn", [PrecisionMonitor()], tmp_path, max_epochs=1, precision="bf16-mixed")
    assert set(store.history.signals) & OURS == {"grad_zeros", "grad_underflow"}
    assert (recorded(store, "grad_underflow") == 0).all()


def test_float32_has_nothing(tmp_path):
    store = watched("cnn", [PrecisionMonitor(every=1)], tmp_path, max_epochs=1)
    assert not set(store.history.signals) & OURS


@pytest.mark.parametrize("bad", [0, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="every"):
        PrecisionMonitor(every=bad)
