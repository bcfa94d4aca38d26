"""The loss of the onset's batch in float32, where the training runs under autocast."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

from torch import Tensor

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

ROUNDING: Final = 0.05
"""Relative difference of the losses up to which low precision only rounds: bfloat16 has 8 bits, and a loss is a mean of many; an engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionMeasures:
    """One batch, the same weights and random state, two precisions."""

    precision: str
    """The trainer's."""
    low: float
    """The loss as the training computes it."""
    float32: float
    """The loss without autocast."""
    text: str


def measure_precision(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> PrecisionMeasures | None:
    """Two forward passes; `None` where the training has no autocast, or gave no loss.

    Args:
        sandbox: Inside `isolated`.
        weights: Those at the onset.
        entry: The batch of the onset.
    """
    precision = str(sandbox.trainer.precision)
    if "mixed" not in precision:
        return None
    low, full = (_loss(sandbox, weights, entry, in_float32=in_float32) for in_float32 in (False, True))
    if low is None or full is None:
        return None
    return PrecisionMeasures(precision=precision, low=low, float32=full, text=_text(precision, low, full))


def _loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, in_float32: bool) -> float | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    outputs = sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at, in_float32=in_float32)
    loss = loss_of(outputs)
    return None if loss is None else float(sandbox.ranks.mean("a loss", [float(loss.detach())])[0])


def _text(precision: str, low: float, full: float) -> str:
    if math.isfinite(full) and not math.isfinite(low):
        return f"The loss is {low} in {precision} and {full:.4g} in float32: low precision made it."
    if not math.isfinite(low) or abs(low - full) <= ROUNDING * abs(full):
        return f"The loss is {low:.4g} in {precision} and {full:.4g} in float32: the precision is not to blame."
    return f"The loss is {low:.4g} in {precision} and {full:.4g} in float32: more than rounding."
