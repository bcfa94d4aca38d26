"""Geometric growth (or shrinking) of the weights around an episode: the same factor with every update."""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.view import EpisodeView

BATCHES_BEFORE: Final = 128
"""Batches before the onset in which growth is looked for: a loss may tolerate growing weights for a while;
engineering choice."""
BATCHES_AFTER: Final = 64
"""Batches after the onset in which it is looked for; engineering choice."""
FASTER_THAN_HEALTHY: Final = 5.0
"""Multiple of the healthy growth rate from which growth is unusual; engineering choice."""
MIN_RATE: Final = 2e-3
"""Smallest log growth per update that counts: training itself moves weights by up to a thousandth of their size
(science.md 2.2)."""
STEADY_FACTOR: Final = 2.0
"""Factor by which single growth rates may differ from the median rate of a steady growth; engineering choice."""
STEADY_SHARE: Final = 0.7
"""Share of the looks that must lie within it; engineering choice."""
MIN_LOOKS: Final = 3
"""Looks at the weights without which growth cannot be seen; engineering choice."""
MAX_EXPONENT: Final = 600.0
"""Cap of exponents, below the overflow of exp in float64 (709), by definition."""

Floats = npt.NDArray[np.float64]
Ordinals = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrowth:
    """A stretch in which the norm of all weights grew, or shrank, by about the same factor with every update."""

    first: int
    """Ordinal of the last look with unchanged weights."""
    shown: int
    """Ordinal of the first look with changed weights."""
    last: int
    before: float
    """Norm of all weights."""
    after: float
    rate: float = 0.0
    """Log growth per update; negative where the weights shrink, 0 where they stayed as they were."""
    steady: bool = False
    along: float | None = None
    """Share of the updates' length that went into the growth; `None` where updates were not measured."""

    @property
    def factor(self) -> float:
        """The factor by which the weights changed, at least 1."""
        return math.exp(min(abs(math.log(self.after / self.before)), MAX_EXPONENT))

    def factor_by(self, ordinal: int) -> float:
        """The factor by which the weights had changed at most at a batch."""
        return math.exp(min(abs(self.rate) * max(ordinal - self.first, 0), MAX_EXPONENT))


def weight_growth(view: EpisodeView) -> WeightGrowth | None:
    """The longest stretch of unusual growth around the onset.

    Returns:
        A growth of rate 0 where the weights stayed as they were; `None` where they were not measured.
    """
    ordinals, norms = _looks(view)
    inside = (ordinals >= view.onset - BATCHES_BEFORE) & (ordinals <= max(view.last, view.onset + BATCHES_AFTER))
    if inside.sum() < MIN_LOOKS:
        return None
    steps = np.array([view.step_of(int(o)) for o in ordinals], dtype=np.float64)
    rates = np.diff(np.log(norms)) / np.maximum(np.diff(steps), 1.0)
    usual = _healthy_rate(view, ordinals[1:], rates, max(int(inside.sum()) // 2, 1))
    fast = np.abs(rates) > max(FASTER_THAN_HEALTHY * usual, MIN_RATE)
    start, end = _longest(np.sign(rates) * (fast & inside[1:]))
    is_growing = end > start
    if not is_growing:
        start, end = (int(place) for place in np.flatnonzero(inside)[[0, -1]])
    growth = WeightGrowth(
        first=int(ordinals[start]), shown=int(ordinals[min(start + 1, end)]), last=int(ordinals[end]),
        before=float(norms[start]), after=float(norms[end]),
    )  # fmt: skip
    return _with_rate(view, growth, ordinals, norms, rates[start:end]) if is_growing else growth


def _looks(view: EpisodeView) -> tuple[Ordinals, Floats]:
    """Ordinals and values of the recorded norms of all weights that are finite and above 0."""
    history = view.store.history
    values = history.series("weight_norm")
    held = np.isfinite(values) & (values > 0.0)
    return history.ordinals[held], values[held]


def _healthy_rate(view: EpisodeView, ordinals: Ordinals, rates: Floats, few: int) -> float:
    early = rates[ordinals < view.onset - BATCHES_BEFORE]
    healthy = early if early.size else rates[ordinals < view.onset - GUARD][:few]
    return float(np.median(np.abs(healthy))) if healthy.size else 0.0


def _longest(signs: Floats) -> tuple[int, int]:
    """First and last look of the longest run of rates of one sign; two equal places where there is none."""
    best, start = (0, 0), 0
    for place in range(1, signs.size + 1):
        if place == signs.size or signs[place] != signs[start]:
            if signs[start] != 0.0 and place - start > best[1] - best[0]:
                best = start, place
            start = place
    return best


def _with_rate(
    view: EpisodeView, growth: WeightGrowth, ordinals: Ordinals, norms: Floats, rates: Floats
) -> WeightGrowth:
    rate = float(np.median(rates))
    alike = (np.abs(rates) < STEADY_FACTOR * abs(rate)) & (np.abs(rates) > abs(rate) / STEADY_FACTOR)
    inside = (ordinals > growth.first) & (ordinals <= growth.last)
    return dataclasses.replace(
        growth, rate=rate, steady=rates.size >= MIN_LOOKS - 1 and bool(alike.mean() >= STEADY_SHARE),
        along=_share_along(view, ordinals[inside], norms[inside], rate),
    )  # fmt: skip


def _share_along(view: EpisodeView, ordinals: Ordinals, norms: Floats, rate: float) -> float | None:
    """Share of the updates' length that lies along the weights: the change of their norm over that length."""
    lengths = [view.at("update_norm", int(ordinal)) for ordinal in ordinals]
    pairs = zip(lengths, norms.tolist(), strict=True)
    relative = [u / w for u, w in pairs if u is not None and math.isfinite(u) and u > 0.0]
    return abs(-math.expm1(-rate)) / float(np.median(relative)) if relative else None
