"""Draws a curve in a few rows of text, two by four Braille dots per character."""

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

MIN_LOG_RATIO: Final = 20.0
"""Highest over lowest value from which a positive series has a log scale; engineering choice. On six rows, 24 dots
high, a linear scale would flatten the lower end to a dot."""

DOT_BITS: Final = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Unicode's Braille patterns: bit of each dot of a character, four rows of two (Unicode Standard, chapter 21, "Braille
Patterns")."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """A drawn curve without axes, and its scale."""

    rows: tuple[str, ...]
    """Top first, each `width` characters."""
    low: float
    """The value at the lower edge."""
    high: float
    """The value at the upper edge."""
    log: bool
    first: int
    """The ordinal at the left edge."""
    last: int

    @property
    def width(self) -> int:
        """Characters in a row."""
        return len(self.rows[0])

    def column(self, ordinal: int) -> int:
        """The character column of a batch, clipped to the drawing."""
        at = (ordinal - self.first) * self.width // (self.last - self.first + 1)
        return min(max(at, 0), self.width - 1)


def draw(ordinals: Ints, values: Floats, *, width: int, height: int) -> Drawing | None:
    """Draws a series; each column spans from its lowest to its highest value, so every value shows.

    Args:
        ordinals: Shape `(n,)`, ascending.
        values: Shape `(n,)`; where it is not finite the curve has a gap, with `×` in the top row.
        width: Characters in a row.
        height: Rows.

    Returns:
        The drawing; `None` if no value is finite.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return None
    low, high = float(values[finite].min()), float(values[finite].max())
    log = low > 0 and high / low >= MIN_LOG_RATIO
    first, last = int(ordinals[0]), int(ordinals[-1])
    columns = (ordinals - first) * (2 * width) // (last - first + 1)
    levels = _levels(values, low, high, log=log, dots=4 * height)
    dots = _dots(columns, levels, finite, shape=(4 * height, 2 * width))
    rows = _characters(dots)
    broken = np.unique(columns[~finite] // 2)
    top = "".join("×" if i in broken else c for i, c in enumerate(rows[0]))
    return Drawing(rows=(top, *rows[1:]), low=low, high=high, log=log, first=first, last=last)


def _levels(values: Floats, low: float, high: float, *, log: bool, dots: int) -> Ints:
    """The dot row of each value, 0 at the bottom and for non-finite values."""
    scale: Callable[[Floats | float], Floats] = np.log if log else np.asarray
    with np.errstate(all="ignore"):
        span = scale(high) - scale(low)
        share = (scale(values) - scale(low)) / span if span > 0 else np.zeros_like(values)
    levels: Ints = np.rint(np.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0) * (dots - 1)).astype(np.int64)
    return levels


def _dots(
    columns: Ints, levels: Ints, finite: npt.NDArray[np.bool_], *, shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Sets the dots of the curve; neighbours are joined except across a gap."""
    dots = np.zeros(shape, dtype=bool)
    for i in np.flatnonzero(finite):
        begin = i - 1 if i > 0 and finite[i - 1] else i
        reach = np.arange(columns[begin], columns[i] + 1)
        line = np.rint(np.linspace(levels[i], levels[begin], reach.size)).astype(np.int64)[::-1]
        for column, a, b in zip(reach, [levels[begin], *line[:-1]], line, strict=True):
            dots[min(a, b) : max(a, b) + 1, column] = True
    return dots[::-1]


def _characters(dots: npt.NDArray[np.bool_]) -> list[str]:
    height, width = dots.shape[0] // 4, dots.shape[1] // 2
    codes = np.einsum("hrwc,rc->hw", dots.reshape(height, 4, width, 2).astype(np.int64), DOT_BITS)
    return ["".join(chr(0x2800 + code) if code else " " for code in row) for row in codes]
