"""Did each step do what its gradient promised: steps that are too long, and steps in a wrong direction."""

import dataclasses
import math
from typing import Final

import numpy as np

from lightning_spike.lab.evaluate import losses_under
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.reproduce import Leg, Reproduction
from lightning_spike.lab.state import TrainState

__all__ = ["Consistency", "consistency"]

FEWEST: Final = 4
"""Updates without which nothing is said."""
HEALTHY: Final = 0.02
"""Share of a healthy run's updates that worsen their own batch's loss, under the random state that the batch had …"""
AGITATED: Final = 0.15
"""… and of a run whose rate is too high (`python benchmarks/lab.py`, the line on own-batch tests). Both low: most steps that are too long for the loss surface still bring something."""
EDGE: Final = 0.6
"""Median of the ratio between healthy runs and such whose rate is too high: below 0.65 it is strong evidence (science.md 2.3), and a net that trains well at a brisk rate may lie little above that."""
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
    updates: int

    @property
    def agitated(self) -> float:
        """Probability, in [0, 1], that the steps are too long all the time, at even odds before: from two binomial rates of worsened updates against each other, and from the median ratio.

        A rate that is chronically too high worsens the loss of few batches, and keeps less of the promise with all of them.
        """
        bad = round(self.worsened * self.updates)
        good = self.updates - bad
        log_odds = bad * math.log(AGITATED / HEALTHY) + good * math.log((1 - AGITATED) / (1 - HEALTHY))
        if math.isfinite(self.rho):
            log_odds += min(max(STEEP * (EDGE - self.rho), -MOST), MOST)
        return 1.0 / (1.0 + math.exp(-log_odds))


def consistency(bench: Bench, again: Reproduction, *, but: int | None = None) -> Consistency | None:
    """Evaluate every kept update's batch once more, after the update (science.md 2.3); one forward pass each. `None` for too few of them.

    Args:
        bench: Inside `isolated`.
        again: The re-run, with its gradients.
        but: Ordinal of an update to leave out, with all after it, for it is in question itself.
    """
    states = [*(leg.before for leg in again.legs), again.end]
    places = [k for k, leg in enumerate(again.legs) if but is None or leg.update.ordinal < but]
    if len(places) < FEWEST:
        return None
    changes = [_change(bench, again.legs[k], states[k + 1]) for k in places]
    promises = [_promise(again.legs[k], states[k + 1]) for k in places]
    ratios = [change / promise for change, promise in zip(changes, promises, strict=True) if promise != 0.0]
    return Consistency(
        rho=float(np.median(ratios)) if ratios else math.nan,
        worsened=float(np.mean(np.array(changes) > 0.0)),
        against=float(np.mean(np.array(promises) > 0.0)),
        updates=len(places),
    )


def _change(bench: Bench, leg: Leg, after: TrainState) -> float:
    entries = leg.update.entries
    later = [float(losses_under(bench, after.weights, [entry], like=entry, held=True)[0]) for entry in entries]
    return float(np.mean(later) - np.mean(leg.made.losses))


def _promise(leg: Leg, after: TrainState) -> float:
    """`g . u`, with the gradient before clipping."""
    before = leg.before.weights
    steps = ((g, after.weights[name] - before[name]) for name, g in leg.made.gradients.items())
    return float(sum((g.to_dense() if g.is_sparse else g).double().flatten() @ u.double().flatten() for g, u in steps))
