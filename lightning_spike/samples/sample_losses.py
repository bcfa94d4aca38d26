"""Losses of single samples near the onset of an episode, under healthy weights where available."""

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

MAX_CONTROLS: Final = 8
"""Healthy batches for comparison, with one pass each; engineering choice."""

Losses = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleLosses:
    """Losses of the samples of a batch, and of healthy batches for comparison."""

    losses: tuple[float, ...]
    control: tuple[float, ...] | None
    """Losses of samples from before the onset, under the same weights; `None` without any."""
    gradient_bounds: tuple[float, ...] | None
    """Upper bounds of the samples' gradient norms; `None` where unknown."""
    control_gradient_bounds: tuple[float, ...] | None
    """Bounds of the control samples."""
    weights: str
    """The weights of the losses, in words."""
    how: Literal["tap", "slices"]
    """As in `PerSampleLosses`; only losses of the same method can be compared."""


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
    """Run the batch and healthy ones again in eval mode, in a sandbox; `None` where it is impossible.

    Uses the snapshot's weights, or the present ones if they are finite. Blocks for up to nine passes or, where the loss
    functions cannot be tapped, two per sample.

    Args:
        trainer: The trainer, between two batches. Runs nothing with several ranks, as `training_step` could wait for
            them.
        module: Its module.
        entry: The batch.
        size: Its number of samples, which that of the losses must equal.
        controls: Healthy batches, oldest first; the newest eight are used.
        snapshot: Weights from before the onset.
        way: The only method to use (`SampleLosses.how`), for comparison with earlier losses.
    """
    if trainer.world_size > 1 or (snapshot is None and not _is_finite(module)):
        return None
    try:
        with isolated(trainer, module) as sandbox:
            usual = _of_controls(sandbox, controls[-MAX_CONTROLS:], snapshot)
            trusting = any(u.how == "tap" and u.explains for u in usual)
            found = _losses(sandbox, entry, snapshot, trusting=trusting, way=way)
    except CannotReplay:
        return None
    if found is None or len(found.losses) != size:
        return None
    usual = [u for u in usual if u.how == found.how]
    gradient_bounds = (
        [u.gradient_bounds for u in usual if u.gradient_bounds is not None] if found.gradient_bounds is not None else []
    )
    return SampleLosses(
        losses=tuple(found.losses.tolist()),
        control=_joined([u.losses for u in usual]),
        gradient_bounds=None if found.gradient_bounds is None else tuple(found.gradient_bounds.tolist()),
        control_gradient_bounds=_joined(gradient_bounds),
        weights=_words(snapshot),
        how=found.how,
    )


def _of_controls(sandbox: Sandbox, controls: Sequence[RingEntry], snapshot: Snapshot | None) -> list[PerSampleLosses]:
    """Losses of the controls from the newest on; only one where samples are run one by one."""
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
        return "the weights at the detection of the episode"
    return f"the snapshot from before step {snapshot.at.step}"


def _is_finite(module: LightningModule) -> bool:
    with torch.no_grad():
        return all(bool(p.isfinite().all()) for p in module.parameters())
