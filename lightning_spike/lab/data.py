"""Whose the batch's part of a jump is: a few samples', or the order's in which they came."""

import contextlib
import dataclasses
from typing import Final

from lightning_spike.lab.findings import finding
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.named_samples import Exchanged, exchange_samples, name_samples, passes_to_name
from lightning_spike.lab.order import Reordered, is_streak, reorder
from lightning_spike.lab.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.lab.split import Split
from lightning_spike.lab.updates_since import updates_since
from lightning_spike.records import Finding

__all__ = ["about_the_order", "about_the_samples"]

WORTH: Final = 0.25
"""Share of the jump from which the batch, or what only it and the weights together make, is looked into."""


def about_the_samples(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> list[Finding]:
    """The batch with the samples that stand out exchanged, where it has a part in the jump; not with several ranks, each of which has other samples.

    Args:
        scene: The episode.
        bench: Inside `isolated(..., with_optimizers=True)`.
        again: Its re-run, up to the struck batch.
        parts: The batch against the weights.
    """
    # Batches that were mixed are not what the user's step was made for: if it fails on them, the other answers stand.
    with contextlib.suppress(Exception):
        if _asks(bench, parts) and (exchanged := _exchanged(scene, bench, again, parts)) is not None:
            return [finding(scene, "samples", dataclasses.asdict(exchanged))]
    return []


def about_the_order(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> list[Finding]:
    """A streak with its samples in another order, where the batch has a part in the jump; arguments as above."""
    with contextlib.suppress(Exception):
        if _asks(bench, parts) and is_streak(scene) and (shuffled := _reordered(scene, bench, again)) is not None:
            return [finding(scene, "order", dataclasses.asdict(shuffled))]
    return []


def _asks(bench: Bench, parts: Split) -> bool:
    return parts.batch_part >= WORTH and bench.trainer.world_size == 1


def _exchanged(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> Exchanged | None:
    ordinary = scene.ordinary()
    needed = passes_to_name(scene.spike)
    if needed > 1 + len(ordinary) or not bench.affords(
        "the batch without the samples that stand out", passes=1, gradients=needed
    ):
        return None
    named = name_samples(bench, scene.snapshot.model, scene.spike, ordinary)
    return exchange_samples(bench, again.weights, scene.spike, ordinary, positions=named, excess=parts.excess)


def _reordered(scene: Scene, bench: Bench, again: Reproduction) -> Reordered | None:
    return reorder(scene, bench, again.legs, updates_since(scene, bench))
