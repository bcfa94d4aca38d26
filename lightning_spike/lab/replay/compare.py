"""Compares the states of the run and of its replay.

Tensor by tensor, in weights and optimizer states.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lightning_spike.experiments import TensorDifference, WriteKind
from lightning_spike.sandbox.state import TrainState

MIN_DIFFERENCE: Final = 0.01
"""Relative difference that is no rounding; engineering choice. Undoing an update leaves about 1e-6 of the weights."""
MAX_EXPONENT_ERROR: Final = 1e-3
"""Distance of a log2 ratio from a whole number that may be rounding, as in `MIN_DIFFERENCE`; engineering choice."""


def differences(actual: TrainState, replayed: TrainState) -> tuple[TensorDifference, ...]:
    """The tensors of two states that differ in a bit, the most different first. Blocks."""
    pairs = [
        *_pairs("weights", actual.weights, replayed.weights),
        *_pairs("optimizer", _flat(actual.optimizers), _flat(replayed.optimizers)),
    ]
    found = [_difference(name, kind, a, b) for kind, name, a, b in pairs if not torch.equal(a, b)]
    return tuple(sorted(found, key=lambda d: -d.relative))


def _pairs(
    kind: WriteKind, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Iterator[tuple[WriteKind, str, Tensor, Tensor]]:
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


def _difference(name: str, kind: WriteKind, a: Tensor, b: Tensor) -> TensorDifference:
    changed, powers = _counts(a.double(), b.double())
    return TensorDifference(
        name=name, kind=kind, relative=_relative(a, b), elements=a.numel(), changed=changed, powers_of_two=powers
    )


def _counts(a: Tensor, b: Tensor) -> tuple[int, int]:
    larger, usual = torch.maximum(a.abs(), b.abs()), b.abs().median()
    changed = ~((a - b).abs() <= MIN_DIFFERENCE * larger.clamp_min(usual))
    octaves = (a[changed] / b[changed]).abs().log2()
    whole = octaves.round()
    flipped = ((octaves - whole).abs() <= MAX_EXPONENT_ERROR) & ((whole != 0) | (a[changed] * b[changed] < 0))
    return int(changed.sum()), int(flipped.sum())


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return math.inf
    size, gap = float(b.double().norm()), float((a.double() - b.double()).norm())
    return gap / size if size > 0 and math.isfinite(gap) else math.inf
