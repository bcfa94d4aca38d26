"""Compares each update's change of its own loss with what its gradient promised (science.md 2.3)."""

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from lightning_spike.experiments import StepSize
from lightning_spike.lab.replay.evaluate import losses_under
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MIN_UPDATES: Final = 4
"""Updates without which nothing is said; engineering choice."""


def step_size(
    sandbox: Sandbox, updates_replayed: Sequence[ReplayedUpdate], end: TrainState, *, but: int | None = None
) -> StepSize | None:
    """Evaluate every kept update's batch once more, after the update (science.md 2.3); one forward pass each.

    `None` for too few of them.

    Args:
        sandbox: Inside `isolated`.
        updates_replayed: Updates in a row, with the state before each, and their gradients.
        end: The state after the last of them.
        but: Ordinal of an update to leave out, with all after it, for it is in question itself.
    """
    states = [*(leg.before for leg in updates_replayed), end]
    places = [k for k, leg in enumerate(updates_replayed) if but is None or leg.update.ordinal < but]
    if len(places) < MIN_UPDATES:
        return None
    return summarized([change_and_promise(sandbox, updates_replayed[k], states[k + 1]) for k in places])


def summarized(kept: Sequence[tuple[float, float]], source: Literal["replay", "present"] = "replay") -> StepSize | None:
    """The step sizes of updates; `None` for too few.

    Args:
        kept: For each update the change of its own batch's loss and what its gradient promised, as `change_and_promise`
            gives them.
        source: Where the updates are from.
    """
    if len(kept) < MIN_UPDATES:
        return None
    ratios = [change / promise for change, promise in kept if promise != 0.0]
    return StepSize(
        rho=float(np.median(ratios)) if ratios else math.nan,
        worsened=float(np.mean([change > 0.0 for change, _ in kept])),
        against=float(np.mean([promise > 0.0 for _, promise in kept])),
        overshot=float(np.mean([change > 0.0 > promise for change, promise in kept])),
        updates=len(kept),
        source=source,
    )


def change_and_promise(sandbox: Sandbox, leg: ReplayedUpdate, after: TrainState) -> tuple[float, float]:
    """The change of an update's own loss, and `g . u`, what the gradient promised.

    The sandbox is left with the weights after it.
    """
    return _change(sandbox, leg, after), _promise(leg, after)


def _change(sandbox: Sandbox, leg: ReplayedUpdate, after: TrainState) -> float:
    entries = leg.update.entries
    later = [float(losses_under(sandbox, after.weights, [entry], like=entry, held=True)[0]) for entry in entries]
    return float(np.mean(later) - np.mean(leg.made.losses))


def _promise(leg: ReplayedUpdate, after: TrainState) -> float:
    """`g . u`, with the gradient before clipping."""
    before = leg.before.weights
    steps = ((g, after.weights[name] - before[name]) for name, g in leg.made.gradients.items())
    return float(sum((g.to_dense() if g.is_sparse else g).double().flatten() @ u.double().flatten() for g, u in steps))
