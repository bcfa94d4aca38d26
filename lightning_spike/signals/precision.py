"""Mixed precision: loss scale, and gradients that underflow."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler

from lightning_spike.signals.subset import is_readable, subset


def loss_scale(scaler: GradScaler) -> Tensor | None:
    """Copy of the scale on its device; `None` before the first backward pass. `get_scale()` waits for the device."""
    scale: Tensor | None = scaler._scale  # as said
    return None if scale is None else scale.detach().clone()


@torch.no_grad()
def underflow(gradients: Sequence[Tensor], smallest: Tensor | float) -> tuple[Tensor, Tensor] | None:
    """Share of gradient entries that are 0, and share of others below `smallest` in size; `None` without gradients.

    Args:
        gradients: Any dtypes and devices, on subsets; unreadable ones are ignored.
        smallest: Smallest normal number of the low precision, over the loss scale if gradients are unscaled.

    Returns:
        Zeros and underflowing, shape `()`, float32, on the first gradient's device. Never blocks.
    """
    readable = [g for g in gradients if is_readable(g)]
    if not readable:
        return None
    device, whole = readable[0].device, sum(g.numel() for g in readable)
    small = torch.as_tensor(smallest, dtype=torch.float64)
    counts = []
    for gradient in readable:
        size = subset(gradient).abs().double()
        is_zero = size == 0
        below = (size < small.to(size.device, non_blocking=True)) & ~is_zero
        share = torch.stack([is_zero.sum(), below.sum()]) * (gradient.numel() / (size.numel() * whole))
        counts.append(share.to(device, torch.float32, non_blocking=True))
    zeros, below = torch.stack(counts).sum(dim=0).unbind()
    return zeros, below
