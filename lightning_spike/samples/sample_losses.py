"""The losses of single samples around the onset of an episode, under weights that were healthy where such are at hand."""

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_spike.errors import CannotReplay
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.snapshot import Snapshot
from lightning_spike.samples.per_sample import PerSampleLosses, samples_under
from lightning_spike.sandbox.isolation import Sandbox, isolated

CONTROLS: Final = 8
"""Healthy batches whose samples the batch's are held against: 256 samples of batches of 32, for one pass each."""

Losses = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleLosses:
    """Losses of a batch, one a sample, and of healthy ones to compare with."""

    losses: tuple[float, ...]
    control: tuple[float, ...] | None
    """Of the samples of batches from before the onset, under the same weights; `None` where there is none."""
    pulls: tuple[float, ...] | None
    """How hard each sample pulls at the weights (see `samples.per_sample`); `None` where that cannot be had."""
    control_pulls: tuple[float, ...] | None
    """Those of the control samples."""
    weights: str
    """Under which weights, in words."""
    how: Literal["tap", "slices"]
    """Read off the loss function, or from samples run one by one: only losses had in the same way can be compared."""


def losses_of_samples(
    trainer: Trainer,
    module: LightningModule,
    entry: RingEntry,
    *,
    size: int,
    controls: Sequence[RingEntry] = (),
    snapshot: Snapshot | None = None,
    way: Literal["tap", "slices"] | None = None,
) -> SampleLosses | None:
    """Run the batch again, and healthy ones, in eval mode, and leave no trace.

    Under the snapshot's weights where there is one, else under the present ones, if these are finite: after an update
    that blew the weights up, every sample looks bad. Blocks, and takes nine passes at most or, where the loss functions
    cannot be listened to, two for each sample.

    Args:
        trainer: The trainer, between two batches. With several ranks nothing is run: what `training_step` gathers from
            the others would wait for ever.
        module: Its module.
        entry: The batch.
        size: Samples in it; losses of another number (a batch of several loaders has no one length) are no answer.
        controls: Healthy batches, oldest first; the newest eight are used.
        snapshot: Weights from before the onset.
        way: The only way to take (`SampleLosses.how`), where the losses are held against earlier ones.

    Returns:
        The losses; `None` where they cannot be had.
    """
    if trainer.world_size > 1 or (snapshot is None and not _is_finite(module)):
        return None
    try:
        with isolated(trainer, module) as sandbox:
            usual = _of_controls(sandbox, controls[-CONTROLS:], snapshot)
            trusting = any(u.how == "tap" and u.explains for u in usual)
            found = _losses(sandbox, entry, snapshot, trusting=trusting, way=way)
    except CannotReplay:
        return None
    if found is None or len(found.losses) != size:
        return None
    usual = [u for u in usual if u.how == found.how]
    pulls = [u.pulls for u in usual if u.pulls is not None] if found.pulls is not None else []
    return SampleLosses(
        losses=tuple(found.losses.tolist()),
        control=_joined([u.losses for u in usual]),
        pulls=None if found.pulls is None else tuple(found.pulls.tolist()),
        control_pulls=_joined(pulls),
        weights=_words(snapshot),
        how=found.how,
    )


def _of_controls(sandbox: Sandbox, controls: Sequence[RingEntry], snapshot: Snapshot | None) -> list[PerSampleLosses]:
    """From the newest on; one is enough where samples must be run one by one."""
    usual: list[PerSampleLosses] = []
    for control in reversed(controls):
        found = _losses(sandbox, control, snapshot)
        if found is not None:
            usual.append(found)
        if found is None or found.how == "slices":
            break
    return usual


def _losses(
    sandbox: Sandbox,
    entry: RingEntry,
    snapshot: Snapshot | None,
    *,
    trusting: bool = False,
    way: Literal["tap", "slices"] | None = None,
) -> PerSampleLosses | None:
    weights = None if snapshot is None else snapshot.model
    return samples_under(
        sandbox, weights, entry.batch, entry.at.batch_idx, random=entry.rng, trusting=trusting, way=way
    )


def _joined(parts: Sequence[Losses]) -> tuple[float, ...] | None:
    return tuple(np.concatenate(parts).tolist()) if parts else None


def _words(snapshot: Snapshot | None) -> str:
    if snapshot is None:
        return "the weights when the episode was noticed"
    return f"the snapshot from before step {snapshot.at.step}"


def _is_finite(module: LightningModule) -> bool:
    with torch.no_grad():
        return all(bool(p.isfinite().all()) for p in module.parameters())
