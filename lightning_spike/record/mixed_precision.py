"""What Lightning's precision plugin is set to: the low precision, and the scaler that is on the gradients."""

from typing import Final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

DTYPES: Final = {"16": torch.float16, "bf16": torch.bfloat16}


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """The gradient scaler, `None` where the run has none."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def low_precision(trainer: Trainer) -> torch.dtype | None:
    """float16 or bfloat16 where Lightning computes in it (`16-mixed`, `bf16-true`, …); `None` else."""
    return DTYPES.get(str(trainer.precision_plugin.precision).split("-", maxsplit=1)[0])


def left_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | float:
    """The loss scale that is still on the gradients.

    Lightning does not unscale for a fused optimizer under fp16 (it does so itself).

    Read as a device tensor from the scaler, since its public `get_scale()` waits for the device.
    """
    scaler = scaler_of(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale: Tensor | None = scaler._scale  # as said
    return 1.0 if scale is None else scale
