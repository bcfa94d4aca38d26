"""Splits the data share of a loss jump into single samples and sample order."""

import contextlib

from lightning_spike.diagnosis.judgement import SUPPORTING_SHARE
from lightning_spike.experiments import SampleExchange, SampleOrder, Split
from lightning_spike.lab.experiments.sample_exchange import exchange_samples, name_samples, passes_to_name
from lightning_spike.lab.experiments.sample_order import is_streak, reorder
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox


def exchange_of_samples(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> SampleExchange | None:
    """The batch with the samples that stand out exchanged, where it has a part in the jump.

    Not with several ranks, each of which has other samples.

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: Its replay, up to the batch in question.
        parts: The batch against the weights.
    """
    # The user's step was not made for mixed batches: if it fails on them, the other experiments stand.
    with contextlib.suppress(Exception):
        needed, ordinary = passes_to_name(scene.spike), scene.ordinary()
        question = "the batch without the samples that stand out"
        if not _asks(sandbox, parts) or needed > 1 + len(ordinary):
            return None
        if not sandbox.affords(question, passes=1, gradients=needed):
            return None
        named = name_samples(sandbox, scene.snapshot.model, scene.spike, ordinary)
        return exchange_samples(sandbox, replay.weights, scene.spike, ordinary, positions=named, excess=parts.excess)
    return None


def order_of_samples(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> SampleOrder | None:
    """A streak with its samples in another order, where the batch has a part in the jump; arguments as above."""
    with contextlib.suppress(Exception):
        if _asks(sandbox, parts) and is_streak(scene):
            return reorder(scene, sandbox, replay.updates_replayed, updates_since(scene, sandbox))
    return None


def _asks(sandbox: Sandbox, parts: Split) -> bool:
    return parts.batch_part >= SUPPORTING_SHARE and sandbox.trainer.world_size == 1
