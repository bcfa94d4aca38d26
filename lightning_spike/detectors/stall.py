"""Stalls: a falling loss that suddenly stops, or one that never moves.

Every training slows down, but the decrements of healthy curves shrink smoothly. So five decrements in a row are
continued geometrically. If the loss then stays flat where a good part of that is expected, it has stalled. The test
runs at four time scales.
"""

import itertools
import math
from typing import Final

from lightning_spike.detectors.noise import bend_noise
from lightning_spike.detectors.resumable import Resumable

BLOCK: Final = 16
"""Losses per block, as in `series.BLOCK`."""
SCALES: Final = (1, 2, 4, 8)
"""Blocks per group."""
GROUPS: Final = 10
"""Groups that are examined: five falling decrements, one that can hold the break, three flat ones;
engineering choice."""
FALLING: Final = 5
"""Falling decrements before a break; engineering choice."""
CONSTANT_AFTER: Final = 128
"""Equal losses from the first one on that are a stall; engineering choice."""
MAX_FLAT_SHARE: Final = 0.15
"""Largest share of the expected decrement of a flat group; engineering choice."""
MISSING_ERRORS: Final = 7.0
"""Standard errors that the missing decrement must have; engineering choice."""
MIN_MISSING: Final = 0.02
"""Smallest missing decrement as a share of the level; engineering choice."""
MAX_MISSING: Final = 0.6
"""Largest missing share of a positive level: a loss near zero must slow down; engineering choice."""
MAX_TOTAL_SHARE: Final = 0.25
"""Largest share of all expected decrements that came; engineering choice."""
SMOOTHNESS: Final = 0.3
"""Share by which a decrement can differ from the geometric course, besides its noise; engineering choice."""
MIN_DECREMENT: Final = 1e-100
"""Smallest decrement, so that products do not underflow; engineering choice."""
ARRIVED_SHARE: Final = 0.1
"""Share of the first level below which a flat loss has converged; engineering choice."""


def _groups(blocks: list[float], scale: int) -> list[float]:
    tail = blocks[-GROUPS * scale :]
    return [sum(tail[start : start + scale]) / scale for start in range(0, len(tail), scale)]


def _broke_off(groups: list[float], noise: float) -> float | None:
    """The break of a smooth fall, in groups from the first one; `None` where there is none.

    The first five decrements must follow a smooth course, and the last three must be missing. The decrement in between
    tells where the break lies: it is whole for a break at its far end.
    """
    drops = [earlier - later for earlier, later in itertools.pairwise(groups)]
    noise *= math.sqrt(2.0)
    falling = drops[:FALLING]
    if min(falling) <= 2.0 * noise:
        return None
    first, last = sum(falling[:2]) / 2.0, sum(falling[-2:]) / 2.0
    ratio: float = (last / first) ** (1.0 / (FALLING - 2))
    if not 0.5 < ratio < 1.1:  # noqa: PLR2004 - slower than by half per group, and not speeding up
        return None
    middle: float = (first * last) ** 0.5
    course = [middle * ratio ** (place - (FALLING - 1) / 2) for place in range(FALLING)]
    if any(abs(drop - due) > SMOOTHNESS * due + noise for drop, due in zip(falling, course, strict=True)):
        return None
    missing = [course[-1] * ratio ** (place + 1) for place in range(1, len(drops) - FALLING)]
    flat = all(
        abs(drop) < MAX_FLAT_SHARE * due + noise for drop, due in zip(drops[FALLING + 1 :], missing, strict=True)
    )
    flat = flat and sum(drops[FALLING + 1 :]) < MAX_TOTAL_SHARE * sum(missing)
    if not flat or sum(missing) <= max(MISSING_ERRORS * noise, MIN_MISSING * abs(groups[-1])):
        return None
    if min(groups) > 0.0 and sum(missing) > MAX_MISSING * groups[-1]:
        return None
    share: float = drops[FALLING] / (course[-1] * ratio)
    return FALLING + 2.0 * max(0.0, min(1.0, share))


class StallDetector(Resumable):
    """Looks for a break in the fall of block medians; `raised` while the loss stands still."""

    STATE = ("_blocks", "_first", "_equal", "_seen", "_start", "_level", "_unit", "raised")

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: list[float] = []
        self._first: float | None = None
        self._equal = 0
        self._seen = 0
        self._start: float | None = None
        self._level = 0.0
        self._unit = 0.0
        self.raised = False

    def push(self, block: list[float], middle: float) -> int | None:
        """Take the next 16 finite losses and their median.

        Returns:
            When a stall has just been noticed: how many losses ago it began; else `None`.
        """
        if self._equal >= 0 and self._constant(block):
            self._raise(middle, 1e-6 * abs(middle))
            return CONSTANT_AFTER - 1
        self._seen += 1
        self._blocks.append(middle)
        if len(self._blocks) > GROUPS * SCALES[-1]:
            del self._blocks[0]
        if self._start is None:
            self._start = middle
        if self.raised:
            self._watch(middle)
            return None
        return self._look()

    def _constant(self, block: list[float]) -> bool:
        """Whether the loss has now been constant for long enough, from the first one on."""
        first = self._first = block[0] if self._first is None else self._first
        same = max(abs(value - first) for value in block) <= 1e-7 * abs(first)
        self._equal = self._equal + len(block) if same else -1
        return self._equal == CONSTANT_AFTER and first != 0.0 and not self.raised

    def _look(self) -> int | None:
        for scale in SCALES:
            if len(self._blocks) < GROUPS * scale or self._seen % scale:
                return None
            groups = _groups(self._blocks, scale)
            if not all(earlier - later > MIN_DECREMENT for earlier, later in itertools.pairwise(groups[: FALLING + 1])):
                continue
            one = bend_noise(self._blocks)
            place = _broke_off(groups, one / math.sqrt(scale))
            if place is not None and abs(groups[-1]) > ARRIVED_SHARE * abs(self._start or 0.0):
                self._raise(groups[-1], max(0.25 * (groups[FALLING - 1] - groups[FALLING]), 3.0 * one))
                return round((GROUPS - place) * scale * BLOCK)
        return None

    def _raise(self, level: float, unit: float) -> None:
        self.raised = True
        self._level, self._unit = level, unit

    def _watch(self, block: float) -> None:
        if abs(block - self._level) > 2.0 * self._unit:
            self.raised = False
            self._blocks.clear()
