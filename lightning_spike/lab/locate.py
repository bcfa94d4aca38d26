"""Find the update that did the damage: after it, ordinary batches too have a higher loss."""

import dataclasses
from collections.abc import Callable, Sequence
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
"""Share of the whole rise that an update guessed from its length must make for the guess to be taken; otherwise the states between are searched."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What one update did to the losses of ordinary batches."""

    leg: int
    """Its place in `Reproduction.legs`."""
    before: Numbers
    """The control batches' losses before it, as they are; shape `(controls,)`."""
    after: Numbers
    """… and after it."""
    share: float
    """Of the whole rise from the first kept state to the onset, the part that this update makes; about 1 for a single blow, less for a slow rise."""

    @property
    def log_rise(self) -> float:
        """Mean rise, on the scale of `log_scale`."""
        scale = log_scale(self.before, self.after)
        return float((scale(self.after) - scale(self.before)).mean())


def damage_on_the_way(
    bench: Bench, again: Reproduction, controls: Sequence[RingEntry], *, like: RingEntry
) -> Damage | None:
    """Which of the kept updates raised the control batches' losses most; `None` where none is kept.

    First guess: the update with the longest step for its kind (against the median of the others), where that makes most of the rise. Otherwise by halving: of two halves of
    the way the one in which the losses rise more, some four evaluations of all controls instead of twelve (science.md 2b.4).

    Args:
        bench: Inside `isolated`.
        again: The re-run.
        controls: Ordinary batches, better such as were trained on before the first state.
        like: Whose random state all are given.
    """
    legs = again.legs
    if not legs:
        return None
    states = [*(leg.before for leg in legs), again.end]
    known: dict[int, Numbers] = {}

    def losses(k: int) -> Numbers:
        if k not in known:
            known[k] = losses_under(bench, states[k].weights, controls, like=like)
        return known[k]

    scale = log_scale(losses(0), losses(len(legs)))
    rise: Callable[[int, int], float] = lambda a, b: float((scale(losses(b)) - scale(losses(a))).mean())  # noqa: E731 - a shorthand
    whole = rise(0, len(legs))
    leg = _longest(states)
    if rise(leg, leg + 1) < MOST_OF_IT * whole:
        leg = _halved(len(legs), rise)
    share = rise(leg, leg + 1) / whole if whole > 0 else 0.0
    return Damage(leg=leg, before=losses(leg), after=losses(leg + 1), share=share)


def _halved(count: int, rise: Callable[[int, int], float]) -> int:
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rise(low, middle) > rise(middle, high) else (middle, high)
    return low


def _longest(states: Sequence[TrainState]) -> int:
    """The update with the longest step."""
    return int(np.argmax([_distance(a, b) for a, b in pairwise(states)]))


def _distance(a: TrainState, b: TrainState) -> float:
    floating = [name for name, tensor in a.weights.items() if tensor.is_floating_point() and name in b.weights]
    return float(sum((b.weights[n] - a.weights[n]).double().square().sum() for n in floating))
