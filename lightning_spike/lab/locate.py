"""Find the update that did the damage, or the few: after it, ordinary batches too have a higher loss."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.lab.evaluate import Numbers, log_scale, losses_under
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.reproduce import Reproduction
from lightning_spike.lab.state import TrainState

__all__ = ["Damage", "damage_on_the_way"]

MOST_OF_IT: Final = 0.7
"""Share of the whole rise that makes most of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What one update, or a few in a row, did to the losses of ordinary batches."""

    first: int
    """The place of the first of them in `Reproduction.legs`."""
    last: int
    """The place of the last; the same for a single blow."""
    before: Numbers
    """The control batches' losses before them, as they are; shape `(controls,)`."""
    after: Numbers
    """… and after them."""
    share: float
    """Of the whole rise from the first kept state to the onset, the part that they make."""

    @property
    def log_rise(self) -> float:
        """Mean rise, on the scale of `log_scale`."""
        scale = log_scale(self.before, self.after)
        return float((scale(self.after) - scale(self.before)).mean())


def damage_on_the_way(
    bench: Bench, again: Reproduction, controls: Sequence[RingEntry], *, like: RingEntry
) -> Damage | None:
    """Which of the kept updates raised the control batches' losses; `None` where none is kept.

    First guess: the update with the longest step, where that makes most of the rise. Then by halving: of two halves of the way the one in which the losses rise
    more, some four evaluations of all controls instead of twelve (science.md 2b.4). Where no single update makes most of it, the shortest row of
    updates that does is taken: a rate that is too high works for some steps before the loss gives way.

    Args:
        bench: Inside `isolated`.
        again: The re-run.
        controls: Ordinary batches, better such as were trained on before the first state.
        like: Whose random state all are given.
    """
    if not again.legs:
        return None
    way = _Way(bench, again, controls, like)
    first = last = way.longest()
    if way.share(first, last + 1) < MOST_OF_IT:
        first = last = way.steepest()
    if way.share(first, last + 1) < MOST_OF_IT:
        first, last = way.shortest_row()
    share = way.share(first, last + 1)
    return Damage(first=first, last=last, before=way.losses(first), after=way.losses(last + 1), share=share)


class _Way:
    """The kept states, each evaluated once at most."""

    def __init__(self, bench: Bench, again: Reproduction, controls: Sequence[RingEntry], like: RingEntry) -> None:
        self._bench, self._controls, self._like = bench, controls, like
        self._states = [*(leg.before for leg in again.legs), again.end]
        self._known: dict[int, Numbers] = {}
        self._scale = log_scale(self.losses(0), self.losses(self._end))

    @property
    def _end(self) -> int:
        return len(self._states) - 1

    def losses(self, k: int) -> Numbers:
        """Of the controls under the k-th state."""
        if k not in self._known:
            self._known[k] = losses_under(self._bench, self._states[k].weights, self._controls, like=self._like)
        return self._known[k]

    def share(self, a: int, b: int) -> float:
        """Part of the whole rise between two states."""
        whole = self._rise(0, self._end)
        return self._rise(a, b) / whole if whole > 0 else 0.0

    def longest(self) -> int:
        """The update with the longest step."""
        return int(np.argmax([_distance(a, b) for a, b in pairwise(self._states)]))

    def steepest(self) -> int:
        """The update with the largest rise, by halving."""
        low, high = 0, self._end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._rise(low, middle) > self._rise(middle, high) else (middle, high)
        return low

    def shortest_row(self) -> tuple[int, int]:
        """The shortest row of updates that makes most of the rise; of several the one that makes more."""
        rows = ((a, b) for length in range(1, self._end + 1) for a, b in self._rows(length))
        enough = next((row for row in rows if self.share(*row) >= MOST_OF_IT), (0, self._end))
        return enough[0], enough[1] - 1

    def _rows(self, length: int) -> list[tuple[int, int]]:
        rows = [(a, a + length) for a in range(self._end - length + 1)]
        return sorted(rows, key=lambda row: -self.share(*row))

    def _rise(self, a: int, b: int) -> float:
        return float((self._scale(self.losses(b)) - self._scale(self.losses(a))).mean())


def _distance(a: TrainState, b: TrainState) -> float:
    floating = [name for name, tensor in a.weights.items() if tensor.is_floating_point() and name in b.weights]
    return float(sum((b.weights[n] - a.weights[n]).double().square().sum() for n in floating))
