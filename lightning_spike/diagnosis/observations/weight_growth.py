"""Geometric growth (or shrinking) of the weights around an episode.

The norm of all weights changes by about the same factor with every update.
"""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.view import EpisodeView

BATCHES_BEFORE: Final = 128
"""Batches before the onset in which the growth is looked for: a loss may tolerate growing weights for a while;
engineering choice."""
BATCHES_AFTER: Final = 64
"""… and after it: a growth goes on where nobody stops it."""
FASTER: Final = 5.0
"""Times the healthy rate of growth from which it is out of the ordinary; engineering choice."""
MIN_RATE: Final = 2e-3
"""Growth by update, on the log scale, below which weights take hundreds of updates to double: training itself moves
them by up to a thousandth of their size (science.md 2)."""
STEADY_FACTOR: Final = 2.0
"""Factor by which one rate of a growth by one mechanism may differ from the median rate; engineering choice …"""
STEADY_SHARE: Final = 0.7
"""… in this share of the looks."""
MIN_LOOKS: Final = 3
"""Looks at the weights without which there is no growth to be seen; engineering choice."""
MAX_EXPONENT: Final = 600.0
"""Exponents are cut off here, below the overflow of exp in float64; engineering choice."""

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrowth:
    """A stretch of the run in which the norm of all weights grew, or shrank, by about the same factor with every update."""

    first: int
    """Ordinal of the last look at which the weights were as before."""
    shown: int
    """… and of the first at which they were not."""
    last: int
    before: float
    """Norm of all weights."""
    after: float
    rate: float
    """By update, on the log scale; negative where they shrink, 0 where they stayed as they were."""
    steady: bool
    along: float | None
    """How much of the updates' length went into the growth; `None` where updates were not measured."""

    @property
    def factor(self) -> float:
        """By what factor the weights differ from before, at least 1."""
        return math.exp(min(abs(math.log(self.after / self.before)), MAX_EXPONENT))

    def factor_by(self, ordinal: int) -> float:
        """By what factor at most they differed at a batch."""
        return math.exp(min(abs(self.rate) * max(ordinal - self.first, 0), MAX_EXPONENT))


def weight_growth(view: EpisodeView) -> WeightGrowth | None:
    """The longest stretch of extraordinary growth around the onset.

    One of rate 0 where weights stayed as they were; `None` where they were not looked at.
    """
    ordinals, norms = _looks(view, "weight_norm")
    inside = (ordinals >= view.onset - BATCHES_BEFORE) & (ordinals <= max(view.last, view.onset + BATCHES_AFTER))
    if inside.sum() < MIN_LOOKS:
        return None
    steps = np.array([view.step_of(int(o)) for o in ordinals], dtype=np.float64)
    rates = np.diff(np.log(norms)) / np.maximum(np.diff(steps), 1.0)
    usual = _healthy_rate(view, ordinals[1:], rates, max(int(inside.sum()) // 2, 1))
    fast = np.abs(rates) > max(FASTER * usual, MIN_RATE)
    start, end = _longest(np.sign(rates) * (fast & inside[1:]))
    if end > start:
        return _grown(view, ordinals, norms, rates, start, end)
    places = np.flatnonzero(inside)
    first, last = int(places[0]), int(places[-1])
    return WeightGrowth(
        first=int(ordinals[first]), shown=int(ordinals[min(first + 1, last)]), last=int(ordinals[last]),
        before=float(norms[first]), after=float(norms[last]), rate=0.0, steady=False, along=None,
    )  # fmt: skip


def _looks(view: EpisodeView, signal: str) -> tuple[npt.NDArray[np.int64], Floats]:
    """Ordinals and values of the looks at a size that gave a finite one above 0."""
    history = view.store.history
    values = history.series(signal)
    held = np.isfinite(values) & (values > 0.0)
    return history.ordinals[held], values[held]


def _healthy_rate(view: EpisodeView, ordinals: npt.NDArray[np.int64], rates: Floats, few: int) -> float:
    early = rates[ordinals < view.onset - BATCHES_BEFORE]
    healthy = early if early.size else rates[ordinals < view.onset - GUARD][:few]
    return float(np.median(np.abs(healthy))) if healthy.size else 0.0


def _longest(signs: Floats) -> tuple[int, int]:
    """First and last look of the longest run of rates of one sign; two equal ones where there is none."""
    best, start = (0, 0), 0
    for place in range(1, signs.size + 1):
        if place == signs.size or signs[place] != signs[start]:
            if signs[start] != 0.0 and place - start > best[1] - best[0]:
                best = start, place
            start = place
    return best


def _grown(
    view: EpisodeView, ordinals: npt.NDArray[np.int64], norms: Floats, rates: Floats, start: int, end: int
) -> WeightGrowth:
    own = rates[start:end]
    rate = float(np.median(own))
    alike = (np.abs(own) < STEADY_FACTOR * abs(rate)) & (np.abs(own) > abs(rate) / STEADY_FACTOR)
    return WeightGrowth(
        first=int(ordinals[start]),
        shown=int(ordinals[min(start + 1, end)]),
        last=int(ordinals[end]),
        before=float(norms[start]),
        after=float(norms[end]),
        rate=rate,
        steady=end - start >= MIN_LOOKS - 1 and bool(alike.mean() >= STEADY_SHARE),
        along=_share_along(view, ordinals[start + 1 : end + 1], norms[start + 1 : end + 1], rate),
    )


def _share_along(view: EpisodeView, ordinals: npt.NDArray[np.int64], norms: Floats, rate: float) -> float | None:
    """An update along the weights has |1 - exp(-rate)| of their new length, by which the norm then differs.

    A longer one went elsewhere too.
    """
    lengths = [view.at("update_norm", int(ordinal)) for ordinal in ordinals]
    pairs = zip(lengths, norms.tolist(), strict=True)
    relative = [u / w for u, w in pairs if u is not None and math.isfinite(u) and u > 0.0]
    return abs(-math.expm1(-rate)) / float(np.median(relative)) if relative else None
