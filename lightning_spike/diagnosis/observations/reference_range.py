"""A statistic of the batches around an episode against its range long before.

It finds what grows or moves over many batches, which the values just before the onset would hide.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.batch_ranges import GUARD, REFERENCE
from lightning_spike.diagnosis.view import EpisodeView

RECENT_BATCHES: Final = 48
"""Batches before the onset that are left out of the range: a slow change may have begun by then; engineering choice."""
MIN_REFERENCE_VALUES: Final = 24
"""Earlier values without which their range is not known; engineering choice."""
MAX_GAP_IN_STRETCH: Final = 1
"""Batches inside the range that do not end a stretch outside it, as at a class boundary in a sorted shard;
engineering choice."""
MIN_STRETCH_BATCHES: Final = 3
"""Batches in a row outside the range from which it is no chance: of 128 values, three in a row lie beyond it by chance
once in two million; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Batches in a row on one side of the range."""

    first: int
    """Ordinal."""
    last: int
    """Ordinal."""
    count: int
    """Batches outside the range among them."""
    above: bool
    furthest: float
    """The value furthest from the range."""
    usual: float
    """The earlier median."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SeriesRange:
    """One series over some batches, and the range of its earlier values.

    The range spans all earlier values, so no distribution is assumed: the next of n values lies above all with
    probability 1 / (n + 1), and several in a row practically never do.
    """

    signal: str
    low: float
    middle: float
    high: float
    ordinals: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """Values of the batches that were asked for, shape `(n,)`, finite."""

    def stretches(self, *, above: bool) -> tuple[Stretch, ...]:
        """The stretches on one side of the range, oldest first."""
        out = self.values > self.high if above else self.values < self.low
        return tuple(self._stretch(places, above) for places in _runs(np.flatnonzero(out).tolist()))

    def _stretch(self, places: list[int], above: bool) -> Stretch:
        inside = self.values[places]
        return Stretch(
            first=int(self.ordinals[places[0]]), last=int(self.ordinals[places[-1]]), count=len(places), above=above,
            furthest=float(inside.max() if above else inside.min()), usual=self.middle,
        )  # fmt: skip

    def times(self, observed: float) -> float:
        """The value as a multiple of the usual one; infinite where the usual one is not positive."""
        return observed / self.middle if self.middle > 0.0 else math.inf


def reference_range(view: EpisodeView, signal: str, first: int, last: int) -> SeriesRange | None:
    """A series over the batches `first` to `last` against its earlier range; `None` where either is missing."""
    history = view.store.history
    series, ordinals = history.series(signal), history.ordinals
    finite = np.isfinite(series)
    asked = finite & (ordinals >= first) & (ordinals <= last)
    known = series[finite & view.healthy & (ordinals < view.onset - GUARD)]
    is_long = known.size >= RECENT_BATCHES + MIN_REFERENCE_VALUES
    old = known[:-RECENT_BATCHES] if is_long else known[: max(known.size // 2, MIN_REFERENCE_VALUES)]
    if old.size < MIN_REFERENCE_VALUES or not asked.any():
        return None
    old = old[-REFERENCE:]
    return SeriesRange(
        signal=signal, low=float(old.min()), middle=float(np.median(old)), high=float(old.max()),
        ordinals=ordinals[asked], values=series[asked],
    )  # fmt: skip


def parts(view: EpisodeView, part: str, statistic: str) -> tuple[str, ...]:
    """The leaves of one part of the batch (`"input"`, `"target"`, `"weight"`) that have this statistic recorded."""
    return tuple(leaf for leaf in view.leaves(statistic) if leaf.split(".")[0] == part)


def longest(stretches: Iterable[Stretch]) -> Stretch | None:
    """The stretch with most batches; `None` without one."""
    return max(stretches, key=lambda s: s.count, default=None)


def _runs(places: list[int]) -> list[list[int]]:
    """Groups of places with at most `MAX_GAP_IN_STRETCH` places between neighbours."""
    breaks = [k for k in range(1, len(places)) if places[k] - places[k - 1] > 1 + MAX_GAP_IN_STRETCH]
    return [places[a:b] for a, b in itertools.pairwise([0, *breaks, len(places)]) if b > a]
