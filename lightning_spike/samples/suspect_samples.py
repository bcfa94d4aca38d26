"""Which samples of a batch stand out.

By their losses, their pulls at the weights, their values, and values that are not finite.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lightning_spike.samples.outliers import LEAST_USUAL, discoveries, tail_probabilities
from lightning_spike.signals.batch import BatchLeaf

STANDS_OUT: Final = 3.5
"""Modified z-score from which a value is an outlier. Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993)."""

NORMAL_MAD: Final = 0.6745
"""Median absolute deviation of a normal variable in standard deviations; from the same."""

LEAST_SPREAD: Final = 0.05
"""Floor of the median absolute deviation on a log scale (5 %): values that are all alike would make any other one an
outlier."""

CLEARLY_LARGER: Final = 2.0
"""How many times the largest reference value a sample's must exceed; an engineering choice: augmentation moves values
by less."""

FEWEST: Final = 4
"""Samples from which a median absolute deviation says anything."""

FALSE_BY_LOSS: Final = 0.05
"""False discovery rate for losses, and for pulls at the weights: of ten batches in which no sample is wrong one is
given a name …"""

FALSE_BY_VALUES: Final = 0.02
"""… and for each of two statistics of the values. An engineering choice; together they name about one innocent in ten
batches (`python benchmarks/samples.py`)."""

MOST: Final = 0.5
"""Share of the batch from which a texture is the batch's own and not that of some samples: data that drift, not samples
that are corrupt."""

TINY: Final = 1e-12

Array = npt.NDArray[np.float64]
Told = tuple[int, float, str]
"""Position, score, reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleValues:
    """How large the values of every single sample are in one floating tensor; arrays of shape `(samples,)`."""

    max_abs: Array
    """Over the finite elements."""
    std: Array
    jumps: Array
    """Root mean square of the difference between neighbours along the last dimension; 0 where there are none."""
    nonfinite: Array
    elements: int
    """Elements per sample."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One sample that stands out."""

    position: int
    """In the batch."""
    score: float
    """How far it stands out, on the scale of a modified z-score; infinite where values are not finite."""
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
    pulls: Sequence[float] | None = None,
    usual_pulls: Sequence[float] | None = None,
) -> list[Suspect]:
    """The samples that stand out, the worst first.

    A sample stands out where its loss or its pull at the weights is too large for the tail of the healthy samples'
    (`outlying`), at a false discovery rate of 5 %; or its values scatter more, or jump more from neighbour to neighbour
    (2 % each). Where fewer than 24 healthy samples are given: where its loss has a modified z-score above 3.5 on a log
    scale. So does one whose largest value has such a score and is twice the largest among healthy samples, one with
    values that are not finite, and one with values that are all the same where others' are not.

    Args:
        values: The batch's samples, by leaf.
        usual: Samples of healthy batches, by leaf.
        losses: The batch's losses, one a sample.
        usual_losses: Losses of samples of healthy batches under the same weights.
        pulls: The samples' pulls at the weights.
        usual_pulls: Those of samples of healthy batches.
    """
    found: list[Told] = []
    for leaf, measured in values.items():
        reference = [batch[leaf] for batch in usual if leaf in batch]
        found += _by_values(leaf, measured, reference)
        found += _by_texture(leaf, measured, reference)
    found += _by_losses(losses, usual_losses)
    found += _by_pulls(pulls, usual_pulls)
    scores: dict[int, list[tuple[float, str]]] = {}
    for position, score, reason in found:
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
        reasons=tuple(reason for _, reason in sorted(told, key=lambda pair: -pair[0])),
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
        jumps = _jumps(kept.reshape(leaf.value.shape))
    return SampleValues(
        max_abs=kept.abs().amax(dim=1).numpy(),
        std=std.numpy(),
        jumps=jumps.numpy(),
        nonfinite=(~finite).sum(dim=1).double().numpy(),
        elements=flat.shape[1],
    )


def _by_values(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Told]:
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


def _constant(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Told]:
    """Samples without any variation, where nearly all others have some.

    The score is the threshold itself, for there is no scale to it.
    """
    spreads = np.concatenate([u.std for u in usual]) if usual else own.std
    if own.elements < FEWEST or spreads.size < FEWEST or float(np.mean(spreads == 0.0)) > 0.01:  # noqa: PLR2004 - one in a hundred
        return []
    return [
        (int(k), STANDS_OUT, f"all {own.elements} values of {leaf} are the same")
        for k in np.flatnonzero((own.std == 0.0) & (own.nonfinite == 0.0))
    ]


def _by_texture(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Told]:
    """Samples whose values scatter or jump more than healthy ones' do.

    None where most do, for that is another kind of data.
    """
    found: list[Told] = []
    for name, words in (("std", "standard deviation"), ("jumps", "difference between neighbours")):
        others = np.concatenate([getattr(u, name) for u in usual]) if usual else np.empty(0)
        told = _by_tail(getattr(own, name), others, FALSE_BY_VALUES, f"{words} of {leaf}")
        found += told if len(told) < MOST * own.std.size else []
    return found


def _by_losses(losses: Sequence[float] | None, usual: Sequence[float] | None) -> list[Told]:
    if losses is None:
        return []
    own = np.asarray(losses, dtype=np.float64)
    found = [(int(k), math.inf, f"loss is {own[k]}") for k in np.flatnonzero(~np.isfinite(own))]
    others = np.asarray(usual, dtype=np.float64) if usual is not None else own
    others = others[np.isfinite(others)]
    if usual is not None and others.size >= LEAST_USUAL:
        return found + _by_tail(own, others, FALSE_BY_LOSS, "loss")
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


def _by_pulls(pulls: Sequence[float] | None, usual: Sequence[float] | None) -> list[Told]:
    """Also where the loss is not out of the ordinary.

    What is far from the others pulls at weights that they leave alone.
    """
    if pulls is None or usual is None:
        return []
    own, others = np.asarray(pulls, dtype=np.float64), np.asarray(usual, dtype=np.float64)
    return _by_tail(own, others, FALSE_BY_LOSS, "pull at the weights (gradient)")


def _by_tail(own: Array, usual: Array, rate: float, what: str) -> list[Told]:
    """Those too large for the tail of the usual ones; what is not finite is told elsewhere."""
    usual = usual[np.isfinite(usual)]
    if usual.size < LEAST_USUAL:
        return []
    chances = tail_probabilities(own, usual)
    median = float(np.median(usual))
    return [
        (int(k), _as_score(float(chances[k])), f"{what} {own[k]:.4g}, usually {median:.4g}")
        for k in np.flatnonzero(discoveries(chances, rate) & np.isfinite(own))
    ]


def _as_score(chance: float) -> float:
    """The z-score of a normal variable that is exceeded as rarely; 38 for what a double cannot hold."""
    return -statistics.NormalDist().inv_cdf(max(chance, 1e-300))


def _jumps(values: torch.Tensor) -> torch.Tensor:
    size = values.shape[0]
    if values.dim() == 1 or values.shape[-1] < 2:  # noqa: PLR2004 - no neighbours
        return torch.zeros(size, dtype=values.dtype)
    return values.diff(dim=-1).reshape(size, -1).square().mean(dim=1).sqrt()


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
