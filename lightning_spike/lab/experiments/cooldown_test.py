"""Is the batch still out of the ordinary for weights that have come to rest?"""

import dataclasses
from collections.abc import Sequence
from typing import Final

from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.loss_after_updates import at_rate, loss_after_updates
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

CALMER: Final = 0.1
"""Factor on the learning rates while the weights come to rest."""
MOST: Final = 4
"""Ordinary batches that it is held against."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cooldown:
    """How a batch stands to ordinary ones before and after the weights have come to rest."""

    before: float
    """Its log-loss over their mean, under the weights as they were (difference of the losses where they can be negative)."""
    after: float
    """The same, under the calmed ones."""
    steps: int

    @property
    def left(self) -> float:
        """Share of the batch's excess that is left, in [0, 1]; 1 where there was none."""
        return min(max(self.after / self.before, 0.0), 1.0) if self.before > 0 else 1.0


def cooldown_test(
    sandbox: Sandbox,
    updates_replayed: Sequence[ReplayedUpdate],
    spike: RingEntry,
    controls: Sequence[RingEntry],
    *,
    excess: float,
) -> Cooldown | None:
    """Train the last updates before the onset once more with a tenth of the rate, and look at the batch again; `None` without updates.

    A batch with wrong labels or values stands out for any sensible weights. One that only stands out while steps are too long for the loss surface, so that the weights are
    thrown about, is ordinary once they have come to rest: then the rate is to blame, with no event to be seen. (One-step tests do not show a chronically high
    rate, science.md 2.3 and 2b.6.) Not a test of a cause by a safer value: what is looked at is the batch, and its loss *over* the others'.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        updates_replayed: The kept updates of the re-run.
        spike: The batch of the onset.
        controls: Ordinary batches.
        excess: How far the batch is above them under the weights as they were, see `Split`.
    """
    if not updates_replayed:
        return None
    calmer = [at_rate(leg.update, CALMER) for leg in updates_replayed]
    after = loss_after_updates(sandbox, updates_replayed[0].before, calmer, [spike, *controls[:MOST]], like=spike)
    if after is None:
        return None
    scaled = log_scale(after)(after)
    return Cooldown(before=excess, after=float(scaled[0] - scaled[1:].mean()), steps=len(updates_replayed))
