"""Evaluates batches after some updates from a state."""

import dataclasses
from collections.abc import Sequence

from lightning_spike.lab.replay.evaluate import Numbers, losses_under
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState


def loss_after_updates(
    sandbox: Sandbox, start: TrainState, updates: Sequence[Update], batches: Sequence[RingEntry], *, like: RingEntry
) -> Numbers | None:
    """Makes updates from a state and returns the batches' losses; `None` if a gradient was not finite. Blocks.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        start: Where to begin.
        updates: In order.
        batches: What is evaluated afterwards.
        like: Whose random state all evaluations are given.
    """
    sandbox.rewind()
    start.load(sandbox)
    if any(make_update(sandbox, update).spoilt_at is not None for update in updates):
        return None
    return losses_under(sandbox, copy_module(sandbox.module), batches, like=like)


def at_rate(update: Update, factor: float) -> Update:
    """The update with all its learning rates times a factor."""
    settings = tuple(
        [{**group, "lr": group["lr"] * factor} if "lr" in group else group for group in step]
        for step in update.settings
    )
    return dataclasses.replace(update, settings=settings)
