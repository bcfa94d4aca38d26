"""Checksums by which ranks can tell that their tensors are equal to the bit."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from lightning_spike.signals.subset import is_readable

BITS: Final = 24
"""Bits of a checksum: as many as float32 holds exactly, so that it travels with the other signals. Two different
tensors agree in one of 1.7e7 cases."""
NO_TENSOR: Final = -1.0
"""Stands for a tensor that is not there: a parameter without a gradient."""
INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(tensors: Sequence[Tensor | None]) -> Tensor:
    """The sum of each tensor's bits read as integers, modulo 2^24.

    The wrap-around sum of Megatron's and the like; it does not see that elements changed places.

    Args:
        tensors: One or more; strided, floating, of any dtype and device. `None` and what has no plain values counts as
            `NO_TENSOR`.

    Returns:
        Shape `(n,)`, float32, whole numbers, on the first present tensor's device. Never blocks.
    """
    readable = [t is not None and is_readable(t) for t in tensors]
    device = next((t.device for t, ok in zip(tensors, readable, strict=True) if t is not None and ok), None)
    sums = [
        _checksum(t).to(device, non_blocking=True) if t is not None and ok else torch.full((), NO_TENSOR, device=device)
        for t, ok in zip(tensors, readable, strict=True)
    ]
    return torch.stack(sums)


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64).remainder(1 << BITS).float()
