"""A loss that was falling and stops from one moment to the next, or that never moved at all.

Every training slows down, so "it no longer falls" is no finding. What healthy curves do not do is to break off: their
decrements shrink smoothly. So five decrements in a row are continued geometrically, and if the loss then stays flat
where a good part of that was due, it has stalled. The same is looked for at four time scales.
"""

import itertools
import math
from typing import Any, Final

from lightning_spike.rolling import MAD_TO_SIGMA, median

BLOCK: Final = 16
SCALES: Final = (1, 2, 4, 8)
"""Blocks per group."""
GROUPS: Final = 10
"""Groups that are looked at: five decrements that fall, one in which the break may lie, three that are flat."""
FALLING: Final = 5
CONSTANT_AFTER: Final = 128
"""Equal losses from the very first one on after which the training is said to stand still."""
FLAT: Final = 0.15
"""Share of the decrement that was due below which the loss stands."""
SURE: Final = 7.0
"""Standard errors that the missing decrement must have."""
LEAST_MISSING: Final = 0.02
"""Share of the level that must be missing to matter."""
MOST_MISSING: Final = 0.6
"""Share of a positive level that can be missing: a loss that falls towards zero has to break off before it is there."""
FLAT_ALL: Final = 0.25
"""Share of all that was due that may have come."""
SMOOTH: Final = 0.3
"""Share by which a decrement may differ from the geometric course, besides its noise."""
TINY: Final = 1e-100
"""Decrements below this are none: their products must not vanish."""
NEAR_ZERO: Final = 0.1
"""Share of the first level below which a flat loss has simply arrived."""


def _groups(blocks: list[float], scale: int) -> list[float]:
    tail = blocks[-GROUPS * scale :]
    return [sum(tail[start : start + scale]) / scale for start in range(0, len(tail), scale)]


def _noise(blocks: list[float]) -> float:
    """Standard deviation of a block, from second differences: they leave out trend."""
    bends = [abs(a - 2.0 * b + c) for a, b, c in zip(blocks, blocks[1:], blocks[2:], strict=False)]
    return median(bends) * MAD_TO_SIGMA / math.sqrt(6.0)


def _broke_off(groups: list[float], noise: float) -> float | None:
    """Where the first five decrements, all of them falls, run on a smooth course and the last three, due on it, are missing.

    Returns:
        The break, in groups from the first one on; `None` where there is none. Between the last falling and the first
        flat group the
        decrement is the larger the later the break: all of it is there for a break at the far end of the two, half for
        the middle.
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
    if any(abs(drop - due) > SMOOTH * due + noise for drop, due in zip(falling, course, strict=True)):
        return None
    missing = [course[-1] * ratio ** (place + 1) for place in range(1, len(drops) - FALLING)]
    flat = all(abs(drop) < FLAT * due + noise for drop, due in zip(drops[FALLING + 1 :], missing, strict=True))
    flat = flat and sum(drops[FALLING + 1 :]) < FLAT_ALL * sum(missing)
    if not flat or sum(missing) <= max(SURE * noise, LEAST_MISSING * abs(groups[-1])):
        return None
    if min(groups) > 0.0 and sum(missing) > MOST_MISSING * groups[-1]:
        return None
    share: float = drops[FALLING] / (course[-1] * ratio)
    return FALLING + 2.0 * max(0.0, min(1.0, share))


class StallDetector:
    """Looks for a break in the fall of block medians; `raised` while the loss stands."""

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
        """Whether the loss has just stood still for as long as it takes, from the first one on."""
        first = self._first = block[0] if self._first is None else self._first
        same = max(abs(value - first) for value in block) <= 1e-7 * abs(first)
        self._equal = self._equal + BLOCK if same else -1
        return self._equal == CONSTANT_AFTER and first != 0.0 and not self.raised

    def _look(self) -> int | None:
        for scale in SCALES:
            if len(self._blocks) < GROUPS * scale or self._seen % scale:
                return None
            groups = _groups(self._blocks, scale)
            if not all(earlier - later > TINY for earlier, later in itertools.pairwise(groups[: FALLING + 1])):
                continue
            one = _noise(self._blocks)
            place = _broke_off(groups, one / math.sqrt(scale))
            if place is not None and abs(groups[-1]) > NEAR_ZERO * abs(self._start or 0.0):
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

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "blocks": list(self._blocks),
            "first": self._first,
            "equal": self._equal,
            "seen": self._seen,
            "start": self._start,
            "level": self._level,
            "unit": self._unit,
            "raised": self.raised,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._blocks = list(state["blocks"])
        self._first = state["first"]
        self._equal = state["equal"]
        self._seen = state["seen"]
        self._start = state["start"]
        self._level = state["level"]
        self._unit = state["unit"]
        self.raised = state["raised"]
