"""Where the run as it is and the run as it comes out again differ: tensor by tensor, in weights and optimizer states."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_spike.lab.state import TrainState

__all__ = ["Difference", "differences"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor that is not the same."""

    name: str
    """The module's name for it, or `"<place of the parameter>.<state>"` for an optimizer's."""
    kind: str
    """`"weights"` or `"optimizer"`."""
    relative: float
    """L2 norm of the difference over that of the replayed tensor; infinite where that is 0 or something is not finite."""


def differences(actual: TrainState, replayed: TrainState) -> tuple[Difference, ...]:
    """The tensors of two states that differ in a bit, the most different first. Blocks."""
    pairs = [
        *_pairs("weights", actual.weights, replayed.weights),
        *_pairs("optimizer", _flat(actual.optimizers), _flat(replayed.optimizers)),
    ]
    found = [
        Difference(name=name, kind=kind, relative=_relative(a, b))
        for kind, name, a, b in pairs
        if not torch.equal(a, b)
    ]
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


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return math.inf
    size, gap = float(b.double().norm()), float((a.double() - b.double()).norm())
    return gap / size if size > 0 and math.isfinite(gap) else math.inf
