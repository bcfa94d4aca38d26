"""Find the update that did the damage, or the few: after it, ordinary batches too have a higher loss."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from lightning_spike.lab.replay.evaluate import Numbers, log_scale, losses_under
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MIN_DAMAGE_SHARE: Final = 0.7
"""Share of the whole rise that the located updates must explain; engineering choice."""
NEGLIGIBLE_DAMAGE: Final = 0.15
"""Share of the whole rise that may be missing at either end; engineering choice."""
MAX_UPDATES: Final = 4
"""Updates in a row at most, since each experiment repeats all of them; engineering choice."""
MIN_EXPERIMENTS: Final = 3
"""Experiments that must fit: two factors, and both; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """The effect of one or a few successive updates on the losses of the control batches."""

    first: int
    """The place of the first of them in `Reproduction.updates_replayed`."""
    last: int
    """The place of the last; the same for a single blow."""
    before: Numbers
    """The control batches' losses before them, as they are; shape `(controls,)`."""
    after: Numbers
    """… and after them."""
    share: float
    """Their share of the rise from the first kept state to the onset."""

    @property
    def log_rise(self) -> float:
        """Mean rise, on the scale of `log_scale`."""
        scale = log_scale(self.before, self.after)
        return float((scale(self.after) - scale(self.before)).mean())


def damage_on_the_way(
    sandbox: Sandbox, replay: Reproduction, controls: Sequence[RingEntry], *, like: RingEntry
) -> Damage | None:
    """Which of the kept updates raised the control batches' losses; `None` where none is kept.

    First guess: the update with the longest step, where that makes most of the rise. Else the row of updates in which
    it comes about: from the last state before which there is next to nothing of it to the first with nearly all of it,
    both found by halving (some four to eight evaluations of all controls instead of thirteen, science.md 2b.4), and
    shortened at its ends for as long as what is left makes most of the rise: a rate that is too high works for some
    steps before the loss gives way. Of a row that is still longer than four updates, the four that make most of it are
    taken; fewer where the sandbox's allowance has no room for questions about four.

    Args:
        sandbox: Inside `isolated`.
        replay: The replay.
        controls: Ordinary batches, better such as were trained on before the first state.
        like: Whose random state all are given.
    """
    if not replay.updates_replayed:
        return None
    way = _Way(sandbox, replay, controls, like)
    first = way.longest()
    last = first
    if way.share(first, last + 1) < MIN_DAMAGE_SHARE:
        first, last = way.row()
    share = way.share(first, last + 1)
    return Damage(first=first, last=last, before=way.losses(first), after=way.losses(last + 1), share=share)


class _Way:
    """The kept states, each evaluated once at most."""

    def __init__(self, sandbox: Sandbox, replay: Reproduction, controls: Sequence[RingEntry], like: RingEntry) -> None:
        self._bench, self._controls, self._like = sandbox, controls, like
        self._states = [*(leg.before for leg in replay.updates_replayed), replay.end]
        self._scale = log_scale(self.losses(0), self.losses(self._end))

    @property
    def _end(self) -> int:
        return len(self._states) - 1

    def losses(self, k: int) -> Numbers:
        """Losses of the control batches under the k-th state."""
        weights = self._states[k].weights
        return losses_under(self._bench, weights, self._controls, like=self._like, held=True)

    def share(self, a: int, b: int) -> float:
        """Part of the whole rise between two states."""
        whole = self._rise(0, self._end)
        return self._rise(a, b) / whole if whole > 0 else 0.0

    def longest(self) -> int:
        """The update with the longest step."""
        place = int(np.argmax([_distance(a, b) for a, b in pairwise(self._states)]))
        return self._bench.ranks.first("the longest step", place)  # buffers may differ from rank to rank

    def row(self) -> tuple[int, int]:
        """The first and the last of the updates in which most of the rise comes about."""
        low, high = self._where(NEGLIGIBLE_DAMAGE), self._where(1.0 - NEGLIGIBLE_DAMAGE) + 1
        longest = self._longest()
        while high - low > 1 and (
            high - low > longest or max(self.share(low + 1, high), self.share(low, high - 1)) >= MIN_DAMAGE_SHARE
        ):
            low, high = max(((low + 1, high), (low, high - 1)), key=lambda row: self.share(*row))
        return low, high - 1

    def _longest(self) -> int:
        """Updates in a row that there is room to ask about."""
        sandbox, passes = self._bench, MIN_EXPERIMENTS * len(self._controls)
        fitting = (n for n in range(MAX_UPDATES, 1, -1) if sandbox.has_room(updates=MIN_EXPERIMENTS * n, passes=passes))
        return sandbox.ranks.first("how many updates in a row", next(fitting, 1))

    def _where(self, part: float) -> int:
        """The update with which the rise goes beyond a part of the whole, by halving."""
        low, high = 0, self._end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share(0, middle) > part else (middle, high)
        return low

    def _rise(self, a: int, b: int) -> float:
        return float((self._scale(self.losses(b)) - self._scale(self.losses(a))).mean())


def _distance(a: TrainState, b: TrainState) -> float:
    floating = [name for name, tensor in a.weights.items() if tensor.is_floating_point() and name in b.weights]
    return float(sum((b.weights[n] - a.weights[n]).double().square().sum() for n in floating))
