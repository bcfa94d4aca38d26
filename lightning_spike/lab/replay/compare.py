"""Where the run as it is and the run as it comes out again differ: tensor by tensor, in weights and optimizer states."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lightning_spike.sandbox.state import TrainState

CLEAR: Final = 0.01
"""Undoing an update leaves a gap of rounding, some 1e-6 of the weights; a changed bit that matters leaves more."""
ROUNDING: Final = 1e-3
"""By how much the logarithm to base 2 of a ratio may be off a whole number, for the same reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor that is not the same."""

    name: str
    """The module's name for it, or `"<place of the parameter>.<state>"` for an optimizer's."""
    kind: str
    """`"weights"` or `"optimizer"`."""
    relative: float
    """L2 norm of the difference over that of the replayed tensor; infinite where that is 0 or something is not finite."""
    elements: int = 0
    """Of the tensor."""
    changed: int = 0
    """Those of them that are clearly others: by more than `CLEAR` of the larger of the two values, and of the tensor's usual size."""
    powers_of_two: int = 0
    """Those of the changed that are a power of two times what they were, at least twice or half, or that with the other sign: what the flip of one bit of the exponent or of the sign does."""


def differences(actual: TrainState, replayed: TrainState) -> tuple[Difference, ...]:
    """The tensors of two states that differ in a bit, the most different first. Blocks."""
    pairs = [
        *_pairs("weights", actual.weights, replayed.weights),
        *_pairs("optimizer", _flat(actual.optimizers), _flat(replayed.optimizers)),
    ]
    found = [_difference(name, kind, a, b) for kind, name, a, b in pairs if not torch.equal(a, b)]
    return tuple(sorted(found, key=lambda d: -d.relative))


def _pairs(kind: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for name in a.keys() & b.keys():
        there = b[name].to(a[name].device)
        if there.shape == a[name].shape:
            yield kind, name, a[name], there


def _flat(optimizers: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{k}.{place}.{key}": value
        for k, optimizer in enumerate(optimizers)
        for place, entry in optimizer["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def _difference(name: str, kind: str, a: Tensor, b: Tensor) -> Difference:
    changed, powers = _counts(a.double(), b.double())
    return Difference(
        name=name, kind=kind, relative=_relative(a, b), elements=a.numel(), changed=changed, powers_of_two=powers
    )


def _counts(a: Tensor, b: Tensor) -> tuple[int, int]:
    larger, usual = torch.maximum(a.abs(), b.abs()), b.abs().median()
    changed = ~((a - b).abs() <= CLEAR * larger.clamp_min(usual))
    octaves = (a[changed] / b[changed]).abs().log2()
    whole = octaves.round()
    flipped = ((octaves - whole).abs() <= ROUNDING) & ((whole != 0) | (a[changed] * b[changed] < 0))
    return int(changed.sum()), int(flipped.sum())


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return math.inf
    size, gap = float(b.double().norm()), float((a.double() - b.double()).norm())
    return gap / size if size > 0 and math.isfinite(gap) else math.inf
