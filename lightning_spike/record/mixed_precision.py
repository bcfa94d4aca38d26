"""The low precision and the gradient scaler of Lightning's precision plugin."""

from typing import Final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

DTYPES: Final = {"16": torch.float16, "bf16": torch.bfloat16}


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """The gradient scaler; `None` without one."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def low_precision(trainer: Trainer) -> torch.dtype | None:
    """float16 or bfloat16 where Lightning computes in it (`16-mixed`, `bf16-true`, …); `None` else."""
    return DTYPES.get(str(trainer.precision_plugin.precision).split("-", maxsplit=1)[0])


def remaining_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | float:
    """The loss scale that the gradients still have.

    A fused optimizer under fp16 unscales them itself. Returns a device tensor, as the public `get_scale()` waits for
    the device.
    """
    scaler = scaler_of(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale: Tensor | None = scaler._scale  # as said
    return 1.0 if scale is None else scale
