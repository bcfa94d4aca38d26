"""Robust statistics over the recent past of one series: plain Python, JSON-able state, a few microseconds per value.

Everything here takes finite floats; whoever calls keeps NaN and Inf out. `SortedWindow` is the workhorse: a ring of the
last values beside the same values in order, so that any quantile is one look-up and an insertion is one `bisect`.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

MAD_TO_SIGMA: Final = 1.4826022185056018
"""1 / Phi^-1(3/4): makes the median absolute deviation an estimate of the standard deviation of normal noise."""


def quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile of values that are in order already, linear between neighbours (numpy's default).

    Args:
        ordered: At least one finite value, ascending.
        q: In [0, 1].
    """
    position = q * (len(ordered) - 1)
    below = int(position)
    if below + 1 >= len(ordered):
        return ordered[-1]
    share = position - below
    return ordered[below] * (1.0 - share) + ordered[below + 1] * share


def median(values: Iterable[float]) -> float:
    """Median of at least one finite value, in any order."""
    return quantile(sorted(values), 0.5)


def mad(values: Sequence[float]) -> float:
    """Median absolute deviation from the median; multiply by `MAD_TO_SIGMA` for a standard deviation."""
    centre = median(values)
    return median(abs(value - centre) for value in values)


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median of at least one value, for noise that is normal about it.

    Sqrt(pi / 2) times that of the mean, with the spread taken from the `mad`.
    """
    return 1.2533 * MAD_TO_SIGMA * mad(values) / math.sqrt(len(values))


def theil_sen(values: Sequence[float]) -> float:
    """Median of the slopes between all pairs, in units of value per place; 0.0 for fewer than two values.

    Takes O(n^2) memory: for some hundred values. Breaks down only when 29 % of the values are wild (Sen 1968).
    """
    if len(values) < 2:  # noqa: PLR2004 - one value has no slope
        return 0.0
    series = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(series), k=1)
    return float(np.median((series[second] - series[first]) / (second - first)))


class SortedWindow:
    """The last `size` values, in the order they came and in the order of their size.

    A push costs one `bisect` and two `memmove`s of at most `size` pointers: under 2 µs for 1,024 values.
    """

    __slots__ = ("_next", "_ring", "ordered", "size")

    def __init__(self, size: int) -> None:
        """Make an empty window that holds at most `size` >= 1 values."""
        self.size = size
        self.ordered: list[float] = []
        """Ascending; read it freely, change it only by `push` and `replace`."""
        self._ring: list[float] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self.ordered)

    def push(self, value: float) -> float | None:
        """Take in a finite value; returns the oldest, which leaves when the window is full."""
        ring, ordered, place = self._ring, self.ordered, self._next
        if len(ring) < self.size:
            ring.append(value)
            insort(ordered, value)
            return None
        oldest = ring[place]
        ring[place] = value
        self._next = place + 1 if place + 1 < self.size else 0
        del ordered[bisect_left(ordered, oldest)]
        insort(ordered, value)
        return oldest

    def replace(self, values: Sequence[float]) -> None:
        """Forget everything and take the last `size` of these instead."""
        self._ring = list(values[-self.size :])
        self._next = 0
        self.ordered = sorted(self._ring)

    def values(self) -> list[float]:
        """Oldest first."""
        return self._ring[self._next :] + self._ring[: self._next]

    def median(self) -> float:
        """Median; the window must not be empty."""
        ordered = self.ordered
        half, odd = divmod(len(ordered), 2)
        return ordered[half] if odd else 0.5 * ordered[half - 1] + 0.5 * ordered[half]

    def quantile(self, q: float) -> float:
        """Quantile, linear between neighbours; the window must not be empty."""
        return quantile(self.ordered, q)


class LazyWindow:
    """The last `size` values, put in order only when they are asked for.

    For windows that are read once in many pushes: a push stores, and the sort that follows finds nearly all in order
    already. What was pushed since the last look at `ordered` is kept beside the last `size` values, so look now and
    then.
    """

    __slots__ = ("_ordered", "_settled", "_values", "size")

    def __init__(self, size: int) -> None:
        """Make an empty window that holds at most `size` >= 1 values."""
        self.size = size
        self._values: list[float] = []
        self._settled = 0
        """The number of them in `_ordered`."""
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return min(len(self._values), self.size)

    def push(self, value: float) -> None:
        """Take in a finite value; the oldest leaves when the window is full."""
        self._values.append(value)

    @property
    def ordered(self) -> list[float]:
        """Ascending; read it freely, do not change it."""
        values, ordered = self._values, self._ordered
        if self._settled < len(values):
            ordered += values[self._settled :]
            ordered.sort()
            surplus = max(0, len(values) - self.size)
            for value in values[:surplus]:
                del ordered[bisect_left(ordered, value)]
            del values[:surplus]
            self._settled = len(values)
        return ordered

    def replace(self, values: Sequence[float]) -> None:
        """Forget everything and take the last `size` of these instead."""
        self._values = list(values[-self.size :])
        self._settled = len(self._values)
        self._ordered = sorted(self._values)

    def latest(self, count: int) -> list[float]:
        """The newest `count` values, oldest first; fewer where there are not as many."""
        return self._values[-count:]

    def back(self, count: int) -> float:
        """The value that came `count` pushes ago, 1 for the newest; there must be as many."""
        return self._values[-count]

    def values(self) -> list[float]:
        """Oldest first."""
        return self._values[-self.size :]
