"""The same samples in another order: does the jump come back when the recent stretch is shuffled?"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from lightning_spike.experiments import SampleOrder
from lightning_spike.lab.replay.evaluate import Numbers
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.samples.batches import gather_samples, samples_in
from lightning_spike.sandbox.isolation import Sandbox

MIN_BATCHES: Final = 3
"""Batches without which there is no order; engineering choice."""
MIN_STREAK: Final = 2
"""Abnormal batches in a row that make a streak; engineering choice."""
ABNORMAL_SHARE: Final = 0.5
"""Position (in logs) between the normal loss and the onset batch's from which a batch is abnormal;
engineering choice."""
SHUFFLE_SEED: Final = 20
"""Seed of the one shuffled order: the same episode gets the same result. An engineering choice."""


def is_streak(scene: Scene) -> bool:
    """Whether another batch near the struck one had a high loss as well, so that there is a stretch to speak of."""
    usual = _usual(scene)
    known = [
        scene.losses.get(e.at.ordinal, math.nan) for e in scene.entries if e.at.ordinal >= scene.snapshot.at.ordinal
    ]
    if not (0.0 < usual < scene.recorded < math.inf):
        return False
    limit = math.exp(math.log(usual) + ABNORMAL_SHARE * math.log(scene.recorded / usual))
    return sum(loss >= limit for loss in known) >= MIN_STREAK


def reorder(
    scene: Scene, sandbox: Sandbox, updates_replayed: Sequence[ReplayedUpdate], updates: Sequence[Update]
) -> SampleOrder | None:
    """Deal the samples of the stretch out anew over its batches, and train on it again from where it began.

    What is compared is the mean loss over the whole stretch: bad samples are as bad wherever they are, and a few spread
    over many batches do no less harm; only what comes of their order goes with it (one-sided batches, each of which
    pulls the weights its own way). One training step for each batch, a dozen at most.

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        updates_replayed: The kept updates of the replay, up to the struck batch.
        updates: Those from the struck batch's on to the present.

    Returns:
        `None` where batches cannot be dealt out anew (samples of different shapes, other structures), too few are
        known, or nothing was high.
    """
    way = [*(leg.update for leg in updates_replayed), *updates][-max(len(updates_replayed), MIN_BATCHES) :]
    first = next((leg for leg in updates_replayed if way and leg.update is way[0]), None)
    entries = [entry for update in way for entry in update.entries]
    losses = np.array([scene.losses.get(entry.at.ordinal, math.nan) for entry in entries])
    usual = _usual(scene)
    if first is None or len(entries) < MIN_BATCHES or not np.isfinite(losses).all() or losses.mean() <= usual:
        return None
    if not sandbox.affords("the same samples in another order", updates=len(entries)):
        return None
    if (dealt := reshuffled(entries)) is None:
        return None
    sandbox.rewind()
    first.before.load(sandbox)
    shuffled: list[float] = []
    for update in way:
        own = tuple(dealt[len(shuffled) : len(shuffled) + len(update.entries)])
        made = make_update(sandbox, dataclasses.replace(update, entries=own))
        shuffled += made.losses
        if made.spoilt_at is not None:
            return None
    return _compared(usual, losses, np.array(shuffled))


def reshuffled(entries: Sequence[RingEntry]) -> list[RingEntry] | None:
    """The same batches with their samples dealt out anew, every batch as large as it was; `None` where that cannot be.

    Draws from a generator of its own.
    """
    sizes = [samples_in(entry.batch) or 0 for entry in entries]
    places = [(k, position) for k, size in enumerate(sizes) for position in range(size)]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(SHUFFLE_SEED)).tolist()
    batches = [entry.batch for entry in entries]
    out: list[RingEntry] = []
    for entry, end in zip(entries, np.cumsum(sizes), strict=True):
        size = samples_in(entry.batch) or 0
        batch = gather_samples(batches, [places[order[k]] for k in range(int(end) - size, int(end))])
        if batch is None:
            return None
        out.append(dataclasses.replace(entry, batch=batch, ids=None))
    return out


def _usual(scene: Scene) -> float:
    before = scene.losses_before()
    before = before[np.isfinite(before)]
    return float(np.median(before)) if before.size else math.nan


def _compared(usual: float, losses: Numbers, shuffled: Numbers) -> SampleOrder:
    loss, anew = float(losses.mean()), float(shuffled.mean())
    left = min(max((anew - usual) / (loss - usual), 0.0), 1.0) if math.isfinite(anew) else 1.0
    return SampleOrder(batches=len(losses), usual=usual, loss=loss, shuffled=anew, left=left)
