"""Layers that break down from one moment to the next and for good.

Gradients that no longer reach them, units that are flat.
"""

import dataclasses
import math
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLOCK: Final = 16
"""Rows of gradient norms that are joined into one median: single batches differ by as much as ten times."""
BLOCKS: Final = 4
"""Blocks of which an expectation is made."""
OWN: Final = 10.0
"""Times that a gradient must have fallen against its own past, and against that of the parameter that has fallen least:
training as a whole may well make all gradients smaller, but alike …"""
BOTH: Final = 1000.0
"""… and of the two together: AUTOTRAINER calls a gradient vanished whose norm is a thousandth of that of the last
layer."""
SAME_LOSS: Final = 0.3
"""Share of its level that the loss must have kept: gradients get small where a loss does."""
CONFIRMED: Final = 2
"""Blocks, or looks, in a row."""

LEAST_LOOKS: Final = 3
"""Looks at the units before one is judged."""
FLAT: Final = 0.8
"""Share of a layer's outputs in the flat parts from which it hardly computes anything any more (TheDeepChecker:
saturated from 0.85 on, dead where half of the units are)."""
ALIVE: Final = 0.05
"""Share that must not have been flat before: below it a layer was as good as flat already."""
SUDDEN: Final = 4.0
"""Times that the share which is not flat must be smaller than at any of the last looks: nets may get sparse, but bit by
bit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """Entries of a vector that have fallen."""

    places: tuple[int, ...]
    """Which, the worst first."""
    before: Array
    now: Array


class GradientFalls:
    """Watches the gradient norms of all parameters; says once when some have all but vanished beside the others."""

    def __init__(self) -> None:
        self._block: list[tuple[Array, float]] = []
        self._past: deque[tuple[Array, float]] = deque(maxlen=BLOCKS)
        self._size: int | None = None
        self._low = 0
        self._told = False

    def push(self, norms: Array, loss: float) -> Fall | None:
        """Take the norms of one update, below 0 where there is no gradient, and the loss of its batch.

        A fall when it has just been confirmed.
        """
        self._size = norms.size if self._size is None else self._size
        if self._told or norms.size != self._size or not np.isfinite(norms).all():
            return None
        self._block.append((norms, loss))
        if len(self._block) < BLOCK:
            return None
        now = np.median([n for n, _ in self._block], axis=0), float(np.median([value for _, value in self._block]))
        self._block = []
        fall = self._judged(*now) if len(self._past) == BLOCKS else None
        if fall is None:
            self._low = 0
            self._past.append(now)
            return None
        self._low += 1
        self._told = self._low >= CONFIRMED
        return fall if self._told else None

    def _judged(self, norms: Array, loss: float) -> Fall | None:
        before = np.median([n for n, _ in self._past], axis=0)
        usual = float(np.median([value for _, value in self._past]))
        known = (before > 0.0) & (norms >= 0.0)
        if not known.any() or not loss > SAME_LOSS * usual:
            return None
        tiny = np.finfo(np.float64).tiny
        falls = np.where(known, np.log(np.maximum(before, tiny)) - np.log(np.maximum(norms, tiny)), 0.0)
        beside = falls - falls[known].min()
        fallen = known & (np.minimum(falls, beside) >= math.log(OWN)) & (falls + beside >= math.log(BOTH))
        places = tuple(int(k) for k in np.argsort(-falls) if fallen[k])
        return Fall(places=places, before=before, now=norms) if places else None


class FlatUnits:
    """Watches the share of every layer's outputs that are flat.

    Says once for each layer when all but all of it has gone flat from one look to the next.
    """

    def __init__(self) -> None:
        self._past: deque[Array] = deque(maxlen=LEAST_LOOKS)
        self._low: dict[int, int] = {}
        self._told: set[int] = set()

    def push(self, shares: Array) -> Fall | None:
        """Take the shares of one look, below 0 for a layer that did not run.

        The layers that have just been confirmed to be flat.
        """
        alive = np.where((shares >= 0.0) & np.isfinite(shares), 1.0 - shares, np.nan)
        if len(self._past) < LEAST_LOOKS or self._past[0].shape != alive.shape:
            self._past.append(alive)
            return None
        least = np.min(self._past, axis=0)
        flat = (alive <= 1.0 - FLAT) & (alive * SUDDEN <= least) & (least >= ALIVE)
        self._low = {int(k): self._low.get(int(k), 0) + 1 for k in np.flatnonzero(flat)}
        self._past.append(np.where(flat, least, alive))
        new = tuple(k for k, looks in self._low.items() if looks >= CONFIRMED and k not in self._told)
        self._told.update(new)
        return Fall(places=tuple(sorted(new, key=lambda k: alive[k])), before=1.0 - least, now=shares) if new else None
