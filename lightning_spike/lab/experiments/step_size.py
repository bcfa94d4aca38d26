"""Did each step do what its gradient promised: steps that are too long, and steps in a wrong direction."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.lab.replay.evaluate import losses_under
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

FEWEST: Final = 4
"""Updates without which nothing is said."""
HEALTHY: Final = 0.02
"""Share of a healthy run's updates that worsen their own batch's loss, under the random state that the batch had …"""
AGITATED: Final = 0.15
"""… and of a run whose rate is too high (`python benchmarks/lab.py`, the line on own-batch tests). Both low: most steps that are too long for the loss surface still bring something."""
EDGE: Final = 0.6
"""Median of the ratio between healthy runs and such whose rate is too high: below 0.65 it is strong evidence (science.md 2.3), and a net that trains well at a brisk rate may lie little above that."""
CHRONIC: Final = 0.9
"""Probability from which steps that are too long explain a trouble of which nothing else is known."""
STEEP: Final = 15.0
"""Log-odds for each unit of the ratio below that: three to one within 0.07."""
MOST: Final = 3.0
"""Log-odds that the ratio gives at most, either way; an engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """The updates before the onset, against the first-order promise of their gradients."""

    rho: float
    """Median of the change of the batch's own loss over `g . u`, what the gradient promised for this step; 1 for a step that is short against the curvature, and
    below 0 where the step overshot so far that its own batch's loss rose."""
    worsened: float
    """Share of the updates after which their own batch's loss was higher than before."""
    against: float
    """Share of the updates that went up the gradient of their own batch (`g . u > 0`): carried by momentum."""
    overshot: float = 0.0
    """Share of the updates that went down the gradient of their own batch, and so far that its loss rose all the same."""
    updates: int

    @property
    def p_chronic(self) -> float:
        """Probability, in [0, 1], that the steps are too long all the time, at even odds before: from two binomial rates of worsened updates against each other, and from the median ratio.

        A rate that is chronically too high worsens the loss of few batches, and keeps less of the promise with all of them.
        """
        bad = round(self.worsened * self.updates)
        good = self.updates - bad
        log_odds = bad * math.log(AGITATED / HEALTHY) + good * math.log((1 - AGITATED) / (1 - HEALTHY))
        if math.isfinite(self.rho):
            log_odds += min(max(STEEP * (EDGE - self.rho), -MOST), MOST)
        return 1.0 / (1.0 + math.exp(-log_odds))


def consistency(
    sandbox: Sandbox, updates_replayed: Sequence[ReplayedUpdate], end: TrainState, *, but: int | None = None
) -> Consistency | None:
    """Evaluate every kept update's batch once more, after the update (science.md 2.3); one forward pass each. `None` for too few of them.

    Args:
        sandbox: Inside `isolated`.
        updates_replayed: Updates in a row, with the state before each, and their gradients.
        end: The state after the last of them.
        but: Ordinal of an update to leave out, with all after it, for it is in question itself.
    """
    states = [*(leg.before for leg in updates_replayed), end]
    places = [k for k, leg in enumerate(updates_replayed) if but is None or leg.update.ordinal < but]
    return (
        summed_up([kept_promise(sandbox, updates_replayed[k], states[k + 1]) for k in places])
        if len(places) >= FEWEST
        else None
    )


def summed_up(kept: Sequence[tuple[float, float]]) -> Consistency | None:
    """Of updates by what became of their own batch's loss and what was promised, as `kept_promise` gives them; `None` for too few."""
    if len(kept) < FEWEST:
        return None
    ratios = [change / promise for change, promise in kept if promise != 0.0]
    return Consistency(
        rho=float(np.median(ratios)) if ratios else math.nan,
        worsened=float(np.mean([change > 0.0 for change, _ in kept])),
        against=float(np.mean([promise > 0.0 for _, promise in kept])),
        overshot=float(np.mean([change > 0.0 > promise for change, promise in kept])),
        updates=len(kept),
    )


def kept_promise(sandbox: Sandbox, leg: ReplayedUpdate, after: TrainState) -> tuple[float, float]:
    """The change of an update's own loss, and `g . u`, what the gradient promised; the sandbox is left with the weights after it."""
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
