"""The cooldown test.

Does the batch still stand out after the last updates were repeated with a tenth of the learning rate?
"""

from collections.abc import Sequence
from typing import Final

from lightning_spike.experiments import Cooldown
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.loss_after_updates import at_rate, loss_after_updates
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

COOLDOWN_RATE: Final = 0.1
"""Factor on the learning rates in the repeated updates (science.md 2b.4)."""
MAX_CONTROLS: Final = 4
"""Control batches that the batch is compared with; engineering choice."""


def cooldown_test(
    sandbox: Sandbox,
    updates_replayed: Sequence[ReplayedUpdate],
    spike: RingEntry,
    controls: Sequence[RingEntry],
    *,
    excess: float,
) -> Cooldown | None:
    """Repeats the last updates with a tenth of the rate and measures the batch's excess again; `None` without updates.

    A batch with wrong labels or values is an outlier under any good weights. If it is one only while steps are too long
    for the loss surface, smaller updates make it normal: the cause is a chronically high rate. One-step tests do not
    show that (science.md 2.3 and 2b.6). The test measures the batch's loss relative to the others, so it is no remedy.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        updates_replayed: The updates of the replay.
        spike: The onset's batch.
        controls: Control batches.
        excess: Excess of the batch's loss over theirs before the test, see `Split`.
    """
    if not updates_replayed:
        return None
    cooler = [at_rate(leg.update, COOLDOWN_RATE) for leg in updates_replayed]
    after = loss_after_updates(
        sandbox, updates_replayed[0].before, cooler, [spike, *controls[:MAX_CONTROLS]], like=spike
    )
    if after is None:
        return None
    scaled = log_scale(after)(after)
    return Cooldown(before=excess, after=float(scaled[0] - scaled[1:].mean()), steps=len(updates_replayed))
