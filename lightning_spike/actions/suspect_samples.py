"""Which samples of a batch stand out: by their losses, by the size of their values, by values that are not finite."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lightning_spike.signals.batch import BatchLeaf

__all__ = ["SampleValues", "Suspect", "find_suspects", "sample_values"]

STANDS_OUT: Final = 3.5
"""Modified z-score from which a value is an outlier. Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993)."""

NORMAL_MAD: Final = 0.6745
"""Median absolute deviation of a normal variable in standard deviations; from the same."""

LEAST_SPREAD: Final = 0.05
"""Floor of the median absolute deviation on a log scale (5 %): values that are all alike would make any other one an outlier."""

CLEARLY_LARGER: Final = 2.0
"""How many times the largest reference value a sample's must exceed; an engineering choice: augmentation moves values by less."""

FEWEST: Final = 4
"""Samples from which a median absolute deviation says anything."""

TINY: Final = 1e-12

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleValues:
    """How large the values of every single sample are in one floating tensor; arrays of shape `(samples,)`."""

    max_abs: Array
    """Over the finite elements."""
    std: Array
    nonfinite: Array
    elements: int
    """Elements per sample."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One sample that stands out."""

    position: int
    """In the batch."""
    score: float
    """The largest of its modified z-scores; infinite where values are not finite."""
    loss: float | None
    max_abs: float | None
    """Largest finite value in any of the batch's floating tensors."""
    reasons: tuple[str, ...]
    """In words, each for a person."""


def sample_values(leaves: Sequence[BatchLeaf], size: int) -> dict[str, SampleValues]:
    """Measure every sample of the floating tensors whose first dimension is the batch's, by leaf name.

    Blocks for tensors on a device.

    Args:
        leaves: The batch's tensors.
        size: Samples in the batch.
    """
    return {
        leaf.name: _measure(leaf)
        for leaf in leaves
        if leaf.value.layout is torch.strided
        and not leaf.value.is_nested
        and not leaf.value.is_quantized
        and leaf.value.is_floating_point()
        and leaf.value.dim() > 0
        and leaf.value.shape[0] == size
        and leaf.value.numel() > 0
    }


def find_suspects(
    values: Mapping[str, SampleValues],
    *,
    usual: Sequence[Mapping[str, SampleValues]] = (),
    losses: Sequence[float] | None = None,
    usual_losses: Sequence[float] | None = None,
) -> list[Suspect]:
    """The samples that stand out, the worst first.

    A sample stands out where its loss, or the largest of its values, has a modified z-score above 3.5 (on a log scale, since both are positive and
    skewed) against the samples of healthy batches, or, where none are given, against the other samples; for values it must also be twice the
    largest among those. A sample with values that are not finite, or all the same where others' are not, stands out too.

    Args:
        values: The batch's samples, by leaf.
        usual: Samples of healthy batches, by leaf.
        losses: The batch's losses, one a sample.
        usual_losses: Losses of samples of a healthy batch under the same weights.
    """
    scores: dict[int, list[tuple[float, str]]] = {}
    for leaf, measured in values.items():
        reference = [batch[leaf] for batch in usual if leaf in batch]
        for position, score, reason in _by_values(leaf, measured, reference):
            scores.setdefault(position, []).append((score, reason))
    for position, score, reason in _by_losses(losses, usual_losses):
        scores.setdefault(position, []).append((score, reason))
    suspects = [_suspect(position, told, values, losses) for position, told in scores.items()]
    return sorted(suspects, key=lambda s: (-s.score, s.position))


def _suspect(
    position: int,
    told: list[tuple[float, str]],
    values: Mapping[str, SampleValues],
    losses: Sequence[float] | None,
) -> Suspect:
    largest = [float(v.max_abs[position]) for v in values.values()]
    return Suspect(
        position=position,
        score=max(score for score, _ in told),
        loss=None if losses is None else float(losses[position]),
        max_abs=max(largest, default=None),
        reasons=tuple(reason for _, reason in told),
    )


def _measure(leaf: BatchLeaf) -> SampleValues:
    with torch.no_grad():
        flat = leaf.value.detach().reshape(leaf.value.shape[0], -1).cpu().double()
        finite = flat.isfinite()
        count = finite.sum(dim=1)
        kept = torch.where(finite, flat, 0.0)
        mean = kept.sum(dim=1) / count.clamp_min(1)
        spread = torch.where(finite, flat - mean.unsqueeze(1), 0.0)
        std = spread.square().sum(dim=1).div(count.clamp_min(1)).sqrt()
    return SampleValues(
        max_abs=kept.abs().amax(dim=1).numpy(),
        std=std.numpy(),
        nonfinite=(~finite).sum(dim=1).double().numpy(),
        elements=flat.shape[1],
    )


def _by_values(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[tuple[int, float, str]]:
    found = [
        (int(k), math.inf, f"{int(own.nonfinite[k])} of {own.elements} values of {leaf} are not finite")
        for k in np.flatnonzero(own.nonfinite)
    ]
    reference = np.concatenate([u.max_abs for u in usual]) if usual else own.max_abs
    ceiling = float(reference.max() if usual else np.quantile(reference, 0.75)) if reference.size else 0.0
    for k, z in enumerate(_modified_z(_log(own.max_abs), _log(reference))):
        if z > STANDS_OUT and own.max_abs[k] > CLEARLY_LARGER * ceiling:
            text = f"largest value of {leaf} {own.max_abs[k]:.4g}, usually up to {ceiling:.4g}"
            found.append((k, float(z), text))
    return found + _constant(leaf, own, usual)


def _constant(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[tuple[int, float, str]]:
    """Samples without any variation, where nearly all others have some; the score is the threshold itself, for there is no scale to it."""
    spreads = np.concatenate([u.std for u in usual]) if usual else own.std
    if own.elements < FEWEST or spreads.size < FEWEST or float(np.mean(spreads == 0.0)) > 0.01:  # noqa: PLR2004 - one in a hundred
        return []
    return [
        (int(k), STANDS_OUT, f"all {own.elements} values of {leaf} are the same")
        for k in np.flatnonzero((own.std == 0.0) & (own.nonfinite == 0.0))
    ]


def _by_losses(losses: Sequence[float] | None, usual: Sequence[float] | None) -> list[tuple[int, float, str]]:
    if losses is None:
        return []
    own = np.asarray(losses, dtype=np.float64)
    found = [(int(k), math.inf, f"loss is {own[k]}") for k in np.flatnonzero(~np.isfinite(own))]
    others = np.asarray(usual, dtype=np.float64) if usual is not None else own
    others = others[np.isfinite(others)]
    if others.size < FEWEST:
        return found
    median = float(np.median(others))
    positive = bool((others > 0.0).all() and (own[np.isfinite(own)] > 0.0).all())
    scale: Any = _log if positive else np.asarray
    floor = LEAST_SPREAD if positive else LEAST_SPREAD * abs(median)
    for k, z in enumerate(_modified_z(scale(own), scale(others), floor)):
        if np.isfinite(own[k]) and z > STANDS_OUT:
            found.append((k, float(z), f"loss {own[k]:.4g}, usually {median:.4g}"))
    return found


def _modified_z(values: Array, reference: Array, floor: float = LEAST_SPREAD) -> Array:
    """Signed: above the reference's median is positive; all zero where the reference is too small to tell."""
    if reference.size < FEWEST:
        return np.zeros(values.shape)
    median = np.median(reference)
    mad = max(float(np.median(np.abs(reference - median))), floor, TINY)
    with np.errstate(invalid="ignore"):
        z: Array = NORMAL_MAD * (values - median) / mad
    return z


def _log(values: Array) -> Array:
    with np.errstate(invalid="ignore"):
        logs: Array = np.log(np.maximum(values, TINY))
    return logs
