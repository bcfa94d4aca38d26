"""Whose the batch's part of a jump is: a few samples', or the order's in which they came."""

import contextlib
import dataclasses
from typing import Final

from lightning_spike.lab.experiments.findings import finding
from lightning_spike.lab.experiments.sample_exchange import Exchanged, exchange_samples, name_samples, passes_to_name
from lightning_spike.lab.experiments.sample_order import Reordered, is_streak, reorder
from lightning_spike.lab.experiments.split import Split
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.records import Finding
from lightning_spike.sandbox.isolation import Sandbox

WORTH: Final = 0.25
"""Share of the jump from which the batch, or what only it and the weights together make, is looked into."""


def about_the_samples(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> list[Finding]:
    """The batch with the samples that stand out exchanged, where it has a part in the jump; not with several ranks, each of which has other samples.

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: Its re-run, up to the struck batch.
        parts: The batch against the weights.
    """
    # Batches that were mixed are not what the user's step was made for: if it fails on them, the other answers stand.
    with contextlib.suppress(Exception):
        if _asks(sandbox, parts) and (exchanged := _exchanged(scene, sandbox, replay, parts)) is not None:
            return [finding(scene, "samples", dataclasses.asdict(exchanged))]
    return []


def about_the_order(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> list[Finding]:
    """A streak with its samples in another order, where the batch has a part in the jump; arguments as above."""
    with contextlib.suppress(Exception):
        if _asks(sandbox, parts) and is_streak(scene) and (shuffled := _reordered(scene, sandbox, replay)) is not None:
            return [finding(scene, "order", dataclasses.asdict(shuffled))]
    return []


def _asks(sandbox: Sandbox, parts: Split) -> bool:
    return parts.batch_part >= WORTH and sandbox.trainer.world_size == 1


def _exchanged(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> Exchanged | None:
    ordinary = scene.ordinary()
    needed = passes_to_name(scene.spike)
    if needed > 1 + len(ordinary) or not sandbox.affords(
        "the batch without the samples that stand out", passes=1, gradients=needed
    ):
        return None
    named = name_samples(sandbox, scene.snapshot.model, scene.spike, ordinary)
    return exchange_samples(sandbox, replay.weights, scene.spike, ordinary, positions=named, excess=parts.excess)


def _reordered(scene: Scene, sandbox: Sandbox, replay: Reproduction) -> Reordered | None:
    return reorder(scene, sandbox, replay.updates_replayed, updates_since(scene, sandbox))
