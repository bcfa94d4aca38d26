"""Layers that break down suddenly and for good: vanished gradients and flat units."""

import dataclasses
import math
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLOCK: Final = 16
"""Rows of gradient norms per median: single batches differ by up to ten times; engineering choice."""
BLOCKS: Final = 4
"""Blocks in the reference; engineering choice."""
MIN_OWN_FALL: Final = 10.0
"""Smallest factor by which a gradient falls below its past, and below the parameter that falls least;
engineering choice."""
MIN_JOINT_FALL: Final = 1000.0
"""Smallest product of the two: AUTOTRAINER's vanished gradient is a thousandth of the last layer's."""
MIN_LOSS_SHARE: Final = 0.3
"""Smallest share of its level that the loss keeps: gradients shrink with the loss; engineering choice."""
CONFIRMATIONS: Final = 2
"""Blocks or samples in a row that confirm a fall; engineering choice."""
MIN_PAST: Final = 3
"""Samples of the units before one is judged; engineering choice."""
MIN_FLAT_SHARE: Final = 0.8
"""Share of flat outputs from which a layer computes hardly anything (TheDeepChecker: saturated from 0.85, dead from
0.5)."""
MIN_ALIVE_SHARE: Final = 0.05
"""Smallest share that was not flat before; below it the layer was flat already; engineering choice."""
MIN_SUDDEN_FALL: Final = 4.0
"""Smallest factor between the shares that are not flat: nets can grow sparse gradually; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """Entries of a vector that fell."""

    places: tuple[int, ...]
    """Their positions, the worst first."""
    before: Array
    now: Array


class GradientFalls:
    """Watches the gradient norms of all parameters; reports once when some vanish beside the others."""

    def __init__(self) -> None:
        self._block: list[tuple[Array, float]] = []
        self._past: deque[tuple[Array, float]] = deque(maxlen=BLOCKS)
        self._size: int | None = None
        self._low = 0
        self._reported = False

    def push(self, norms: Array, loss: float) -> Fall | None:
        """Add the norms of one update and the loss of its batch; returns a fall when it is confirmed.

        Args:
            norms: One per parameter, below 0 where there is no gradient.
            loss: Of the batch.
        """
        self._size = norms.size if self._size is None else self._size
        if self._reported or norms.size != self._size or not np.isfinite(norms).all():
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
        self._reported = self._low >= CONFIRMATIONS
        return fall if self._reported else None

    def _judged(self, norms: Array, loss: float) -> Fall | None:
        before = np.median([n for n, _ in self._past], axis=0)
        usual = float(np.median([value for _, value in self._past]))
        known = (before > 0.0) & (norms >= 0.0)
        if not known.any() or not loss > MIN_LOSS_SHARE * usual:
            return None
        tiny = np.finfo(np.float64).tiny
        falls = np.where(known, np.log(np.maximum(before, tiny)) - np.log(np.maximum(norms, tiny)), 0.0)
        beside = falls - falls[known].min()
        fallen = (
            known & (np.minimum(falls, beside) >= math.log(MIN_OWN_FALL)) & (falls + beside >= math.log(MIN_JOINT_FALL))
        )
        places = tuple(int(k) for k in np.argsort(-falls) if fallen[k])
        return Fall(places=places, before=before, now=norms) if places else None


class FlatUnits:
    """Watches the share of flat outputs of every layer; reports once per layer when it suddenly goes flat."""

    def __init__(self) -> None:
        self._past: deque[Array] = deque(maxlen=MIN_PAST)
        self._low: dict[int, int] = {}
        self._reported: set[int] = set()

    def push(self, shares: Array) -> Fall | None:
        """Add one sample; returns the layers that are now confirmed to be flat.

        Args:
            shares: One per layer, below 0 for a layer that did not run.
        """
        alive = np.where((shares >= 0.0) & np.isfinite(shares), 1.0 - shares, np.nan)
        if len(self._past) < MIN_PAST or self._past[0].shape != alive.shape:
            self._past.append(alive)
            return None
        least = np.min(self._past, axis=0)
        flat = (alive <= 1.0 - MIN_FLAT_SHARE) & (alive * MIN_SUDDEN_FALL <= least) & (least >= MIN_ALIVE_SHARE)
        self._low = {int(k): self._low.get(int(k), 0) + 1 for k in np.flatnonzero(flat)}
        self._past.append(np.where(flat, least, alive))
        new = tuple(k for k, looks in self._low.items() if looks >= CONFIRMATIONS and k not in self._reported)
        self._reported.update(new)
        return Fall(places=tuple(sorted(new, key=lambda k: alive[k])), before=1.0 - least, now=shares) if new else None
