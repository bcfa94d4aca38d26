"""Whose the batch's part of a jump is: a few samples', or the order's in which they came."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Final

from lightning_spike.lab.findings import finding
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.named_samples import Exchanged, exchange_samples, name_samples
from lightning_spike.lab.order import Reordered, is_streak, reorder
from lightning_spike.lab.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.lab.split import Split
from lightning_spike.lab.updates_since import updates_since
from lightning_spike.records import Finding

__all__ = ["about_the_data"]

WORTH: Final = 0.25
"""Share of the jump from which the batch, or what only it and the weights together make, is looked into."""


def about_the_data(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> list[Finding]:
    """Two experiments on the samples, where the batch has a part in the jump: `samples`, and in a streak `order`.

    Not with several ranks, each of which has other samples.

    Args:
        scene: The episode.
        bench: Inside `isolated(..., with_optimizers=True)`.
        again: Its re-run, up to the struck batch.
        parts: The batch against the weights.
    """
    if parts.batch_part < WORTH or bench.trainer.world_size > 1:
        return []
    return list(_told(scene, bench, again, parts))


def _told(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> Iterator[Finding]:
    # Batches that were mixed are not what the user's step was made for: if it fails on them, the other answers stand.
    with contextlib.suppress(Exception):
        if (exchanged := _exchanged(scene, bench, again, parts)) is not None:
            yield finding(scene, "samples", dataclasses.asdict(exchanged))
    with contextlib.suppress(Exception):
        if is_streak(scene) and (shuffled := _reordered(scene, bench, again)) is not None:
            yield finding(scene, "order", dataclasses.asdict(shuffled))


def _exchanged(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> Exchanged | None:
    ordinary = scene.ordinary()
    named = name_samples(bench, scene.snapshot.model, scene.spike, ordinary)
    return exchange_samples(bench, again.weights, scene.spike, ordinary, positions=named, excess=parts.excess)


def _reordered(scene: Scene, bench: Bench, again: Reproduction) -> Reordered | None:
    return reorder(scene, bench, again.legs, updates_since(scene, bench))
