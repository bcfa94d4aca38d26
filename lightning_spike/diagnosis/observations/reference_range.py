"""A statistic of the batches around an episode beside what it was long before.

For what grows or moves over many batches, which the values just before would hide.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.constants import GUARD, REFERENCE
from lightning_spike.diagnosis.view import EpisodeView

GAP: Final = 48
"""Batches before the onset that are taken as recent: what moves over some tens of batches has begun by then."""
FEWEST: Final = 24
"""Values of long before without which their range is not known."""
FEW_MISSES: Final = 1
"""Batches inside the range that do not end a stretch outside of it: a class boundary in a sorted shard, one batch of
the old source."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Batches in a row on one side of the range."""

    first: int
    last: int
    """Ordinals."""
    count: int
    """Batches out of the range among them."""
    above: bool
    furthest: float
    """The value furthest from the range."""
    usual: float
    """The median of long before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SeriesRange:
    """One series over some batches, and the range that it had long before.

    The range is that of all values of long before, so that nothing is assumed of their law: of n of them, a further one
    lies above all with probability 1 / (n + 1), and several in a row practically never do.
    """

    signal: str
    low: float
    middle: float
    high: float
    ordinals: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """Of the batches that were asked for, shape `(n,)`, finite."""

    def stretches(self, *, above: bool) -> tuple[Stretch, ...]:
        """The stretches on one side of the range, oldest first."""
        out = self.values > self.high if above else self.values < self.low
        return tuple(self._stretch(places, above) for places in _runs(np.flatnonzero(out).tolist()))

    def _stretch(self, places: list[int], above: bool) -> Stretch:
        inside = self.values[places]
        return Stretch(
            first=int(self.ordinals[places[0]]),
            last=int(self.ordinals[places[-1]]),
            count=len(places),
            above=above,
            furthest=float(inside.max() if above else inside.min()),
            usual=self.middle,
        )

    def times(self, observed: float) -> float:
        """How many times as large as usual a value is; infinite where the usual one is not positive."""
        return observed / self.middle if self.middle > 0.0 else math.inf


def reference_range(view: EpisodeView, signal: str, first: int, last: int) -> SeriesRange | None:
    """A series over the batches `first` to `last` against what it was long before the onset; `None` where either is missing."""
    history = view.store.history
    series, ordinals = history.series(signal), history.ordinals
    finite = np.isfinite(series)
    asked = finite & (ordinals >= first) & (ordinals <= last)
    known = series[finite & view.healthy & (ordinals < view.onset - GUARD)]
    old = known[:-GAP] if known.size >= GAP + FEWEST else known[: max(known.size // 2, FEWEST)]
    if old.size < FEWEST or not asked.any():
        return None
    old = old[-REFERENCE:]
    return SeriesRange(
        signal=signal,
        low=float(old.min()),
        middle=float(np.median(old)),
        high=float(old.max()),
        ordinals=ordinals[asked],
        values=series[asked],
    )


def parts(view: EpisodeView, part: str, statistic: str) -> tuple[str, ...]:
    """The leaves of one part of the batch (`"input"`, `"target"`, `"weight"`) that have this statistic recorded."""
    return tuple(leaf for leaf in view.leaves(statistic) if leaf.split(".")[0] == part)


def longest(stretches: Iterable[Stretch]) -> Stretch | None:
    """The one with most batches, `None` of none."""
    return max(stretches, key=lambda s: s.count, default=None)


def _runs(places: list[int]) -> list[list[int]]:
    """Places that follow one another with at most `FEW_MISSES` between."""
    breaks = [0, *(k for k in range(1, len(places)) if places[k] - places[k - 1] > 1 + FEW_MISSES), len(places)]
    return [places[a:b] for a, b in itertools.pairwise(breaks) if b > a]
