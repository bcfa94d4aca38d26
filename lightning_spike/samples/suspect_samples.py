"""Outliers among the samples of a batch, by loss, gradient norm, values and non-finite values."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lightning_spike.samples.outliers import MIN_USUAL, discoveries, tail_probabilities
from lightning_spike.signals.batch import BatchLeaf
from lightning_spike.signals.subset import is_readable

OUTLIER_SCORE: Final = 3.5
"""Modified z-score of an outlier. Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993)."""

NORMAL_MAD: Final = 0.6745
"""Median absolute deviation of a normal variable in standard deviations, by definition: the normal 0.75 quantile."""

MIN_SPREAD: Final = 0.05
"""Smallest median absolute deviation on a log scale, for values that are all alike; engineering choice."""

MIN_FACTOR: Final = 2.0
"""Smallest factor over the largest reference value; augmentation changes values by less; engineering choice."""

MIN_SAMPLES: Final = 4
"""Samples for a median absolute deviation; engineering choice."""

LOSS_FDR: Final = 0.05
"""False discovery rate of losses and of gradient norms; engineering choice."""

VALUE_FDR: Final = 0.02
"""False discovery rate of each of two statistics of the values; engineering choice; all together name about one
innocent sample in ten batches (`python benchmarks/samples.py`)."""

MAX_TEXTURE_SHARE: Final = 0.5
"""Share of the batch from which a texture is a drift of the data, not a fault of samples; engineering choice."""

MAX_CONSTANT_SHARE: Final = 0.01
"""Share of constant samples from which a constant one is no outlier; engineering choice."""

TINY: Final = 1e-12
"""Smallest value before a logarithm or in a denominator; engineering choice."""

Array = npt.NDArray[np.float64]
Reason = tuple[int, float, str]
"""Position, score, reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleValues:
    """Statistics of every sample in one floating tensor, arrays of shape `(samples,)`."""

    max_abs: Array
    """Over the finite elements."""
    std: Array
    jumps: Array
    """Root mean square difference of neighbours along the last dimension; 0 without neighbours."""
    nonfinite: Array
    elements: int
    """Elements per sample."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One outlier."""

    position: int
    """In the batch."""
    score: float
    """Modified z-score; infinite for non-finite values."""
    loss: float | None
    max_abs: float | None
    """Largest finite value in any of the batch's floating tensors."""
    reasons: tuple[str, ...]
    """In words."""


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
        if is_readable(leaf.value) and leaf.value.dim() > 0 and leaf.value.shape[0] == size
    }


def find_suspects(
    values: Mapping[str, SampleValues],
    *,
    usual: Sequence[Mapping[str, SampleValues]] = (),
    losses: Sequence[float] | None = None,
    usual_losses: Sequence[float] | None = None,
    gradient_bounds: Sequence[float] | None = None,
    usual_gradient_bounds: Sequence[float] | None = None,
) -> list[Suspect]:
    """Outliers of a batch, the worst first.

    - Loss or gradient norm beyond the tail of healthy samples, at a false discovery rate of 5 %. With fewer than 24
      healthy samples: a loss with a modified z-score above 3.5 on a log scale.
    - Standard deviation, or difference of neighbours, beyond that tail at 2 % each.
    - A largest value with a modified z-score above 3.5 and twice the largest of healthy samples.
    - Non-finite values, or constant values where others vary.

    Args:
        values: The batch's samples, by leaf.
        usual: Samples of healthy batches, by leaf.
        losses: The losses, one per sample.
        usual_losses: Losses of samples of healthy batches under the same weights.
        gradient_bounds: Upper bounds of the samples' gradient norms.
        usual_gradient_bounds: Bounds of samples of healthy batches.
    """
    found: list[Reason] = []
    for leaf, measured in values.items():
        reference = [batch[leaf] for batch in usual if leaf in batch]
        found += _by_values(leaf, measured, reference)
        found += _by_texture(leaf, measured, reference)
    found += _by_losses(losses, usual_losses)
    found += _by_gradients(gradient_bounds, usual_gradient_bounds)
    scores: dict[int, list[tuple[float, str]]] = {}
    for position, score, reason in found:
        scores.setdefault(position, []).append((score, reason))
    suspects = [_suspect(position, reasons, values, losses) for position, reasons in scores.items()]
    return sorted(suspects, key=lambda s: (-s.score, s.position))


def _suspect(
    position: int, reasons: list[tuple[float, str]], values: Mapping[str, SampleValues], losses: Sequence[float] | None
) -> Suspect:
    largest = [float(v.max_abs[position]) for v in values.values()]
    return Suspect(
        position=position,
        score=max(score for score, _ in reasons),
        loss=None if losses is None else float(losses[position]),
        max_abs=max(largest, default=None),
        reasons=tuple(reason for _, reason in sorted(reasons, key=lambda pair: -pair[0])),
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


def _by_values(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Reason]:
    found = [
        (int(k), math.inf, f"{int(own.nonfinite[k])} of {own.elements} values of {leaf} are not finite")
        for k in np.flatnonzero(own.nonfinite)
    ]
    reference = np.concatenate([u.max_abs for u in usual]) if usual else own.max_abs
    rank = 1.0 if usual else 0.75
    ceiling = float(np.quantile(reference, rank)) if reference.size else 0.0
    for k, z in enumerate(_modified_z(_log(own.max_abs), _log(reference))):
        if z > OUTLIER_SCORE and own.max_abs[k] > MIN_FACTOR * ceiling:
            text = f"largest value of {leaf} {own.max_abs[k]:.4g}, usually up to {ceiling:.4g}"
            found.append((k, float(z), text))
    return found + _constant(leaf, own, usual)


def _constant(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Reason]:
    """Constant samples where nearly all others vary; their score is the threshold."""
    spreads = np.concatenate([u.std for u in usual]) if usual else own.std
    if min(own.elements, spreads.size) < MIN_SAMPLES or np.mean(spreads == 0.0) > MAX_CONSTANT_SHARE:
        return []
    return [
        (int(k), OUTLIER_SCORE, f"all {own.elements} values of {leaf} are the same")
        for k in np.flatnonzero((own.std == 0.0) & (own.nonfinite == 0.0))
    ]


def _by_texture(leaf: str, own: SampleValues, usual: Sequence[SampleValues]) -> list[Reason]:
    """Samples with larger standard deviation or difference of neighbours; none where most samples have one."""
    found: list[Reason] = []
    for name, words in (("std", "standard deviation"), ("jumps", "difference between neighbours")):
        others = np.concatenate([getattr(u, name) for u in usual]) if usual else np.empty(0)
        reasons = _by_tail(getattr(own, name), others, VALUE_FDR, f"{words} of {leaf}")
        found += reasons if len(reasons) < MAX_TEXTURE_SHARE * own.std.size else []
    return found


def _by_losses(losses: Sequence[float] | None, usual: Sequence[float] | None) -> list[Reason]:
    if losses is None:
        return []
    own = np.asarray(losses, dtype=np.float64)
    found = [(int(k), math.inf, f"loss is {own[k]}") for k in np.flatnonzero(~np.isfinite(own))]
    others = np.asarray(usual, dtype=np.float64) if usual is not None else own
    others = others[np.isfinite(others)]
    if usual is not None and others.size >= MIN_USUAL:
        return found + _by_tail(own, others, LOSS_FDR, "loss")
    if others.size < MIN_SAMPLES:
        return found
    median = float(np.median(others))
    positive = bool((others > 0.0).all() and (own[np.isfinite(own)] > 0.0).all())
    scale: Any = _log if positive else np.asarray
    floor = MIN_SPREAD if positive else MIN_SPREAD * abs(median)
    for k, z in enumerate(_modified_z(scale(own), scale(others), floor)):
        if np.isfinite(own[k]) and z > OUTLIER_SCORE:
            found.append((k, float(z), f"loss {own[k]:.4g}, usually {median:.4g}"))
    return found


def _by_gradients(gradient_bounds: Sequence[float] | None, usual: Sequence[float] | None) -> list[Reason]:
    """Samples with a large gradient norm, also with a usual loss."""
    if gradient_bounds is None or usual is None:
        return []
    own, others = np.asarray(gradient_bounds, dtype=np.float64), np.asarray(usual, dtype=np.float64)
    return _by_tail(own, others, LOSS_FDR, "gradient norm")


def _by_tail(own: Array, usual: Array, rate: float, what: str) -> list[Reason]:
    """Samples beyond the tail of the usual ones; ignores non-finite values."""
    usual = usual[np.isfinite(usual)]
    if usual.size < MIN_USUAL:
        return []
    chances = tail_probabilities(own, usual)
    median = float(np.median(usual))
    return [
        (int(k), _as_score(float(chances[k])), f"{what} {own[k]:.4g}, usually {median:.4g}")
        for k in np.flatnonzero(discoveries(chances, rate) & np.isfinite(own))
    ]


def _as_score(chance: float) -> float:
    """The normal quantile of this chance, at most 38."""
    return -statistics.NormalDist().inv_cdf(max(chance, 1e-300))


def _jumps(values: torch.Tensor) -> torch.Tensor:
    size = values.shape[0]
    if values.dim() == 1 or values.shape[-1] < 2:  # noqa: PLR2004 - no neighbours
        return torch.zeros(size, dtype=values.dtype)
    return values.diff(dim=-1).reshape(size, -1).square().mean(dim=1).sqrt()


def _modified_z(values: Array, reference: Array, floor: float = MIN_SPREAD) -> Array:
    """Signed modified z-scores; all zero for a small reference."""
    if reference.size < MIN_SAMPLES:
        return np.zeros(values.shape)
    median = np.median(reference)
    mad = max(float(np.median(np.abs(reference - median))), floor, TINY)
    with np.errstate(invalid="ignore"):
        return np.asarray(NORMAL_MAD * (values - median) / mad)


def _log(values: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.log(np.maximum(values, TINY)))
