"""Checksums that show whether the tensors of ranks are bit-identical."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from lightning_spike.signals.subset import is_readable

BITS: Final = 24
"""Bits of a checksum, which float32 holds exactly by definition; 1 in 1.7e7 pairs of tensors collides."""
NO_TENSOR: Final = -1.0
"""Checksum of a missing tensor, such as that of a parameter without a gradient."""
INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(tensors: Sequence[Tensor | None]) -> Tensor:
    """Sum of each tensor's bits as integers, modulo 2^24; it does not change with the order of elements.

    Args:
        tensors: One or more; `None` and unreadable ones give `NO_TENSOR`.

    Returns:
        Shape `(n,)`, float32, whole numbers, on the first present tensor's device. Never blocks.
    """
    readable = [t if t is not None and is_readable(t) else None for t in tensors]
    device = next((t.device for t in readable if t is not None), None)
    missing = torch.full((), NO_TENSOR, device=device)
    return torch.stack([missing if t is None else _checksum(t).to(device, non_blocking=True) for t in readable])


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64).remainder(1 << BITS).float()
