"""The losses of single samples around the onset of an episode, under weights that were healthy where such are at hand."""

import dataclasses

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.snapshot import Snapshot
from lightning_spike.actions.state_copy import load_module
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import isolated
from lightning_spike.lab.per_sample import per_sample_losses

__all__ = ["SampleLosses", "losses_of_samples"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleLosses:
    """Losses of a batch, one a sample, and of a healthy one to compare with."""

    losses: tuple[float, ...]
    control: tuple[float, ...] | None
    """Of the batch before the onset, under the same weights; `None` where there is none, or where samples would have to be run one by one."""
    weights: str
    """Under which weights, in words."""


def losses_of_samples(
    trainer: Trainer,
    module: LightningModule,
    entry: RingEntry,
    *,
    size: int,
    control: RingEntry | None = None,
    snapshot: Snapshot | None = None,
) -> SampleLosses | None:
    """Run the batch again, and leave no trace.

    Under the snapshot's weights where there is one, else under the present ones, if these are finite: after an update that blew the weights up, every sample looks bad.
    Blocks, and takes as long as a step or, where the loss functions cannot be listened to, as long as one for each sample.

    Args:
        trainer: The trainer, between two batches. With several ranks nothing is run: what `training_step` gathers from the others would wait for ever.
        module: Its module.
        entry: The batch.
        size: Samples in it; losses of another number (a batch of several loaders has no one length) are no answer.
        control: A healthy batch.
        snapshot: Weights from before the onset.

    Returns:
        The losses; `None` where they cannot be had.
    """
    if trainer.world_size > 1 or (snapshot is None and not _is_finite(module)):
        return None
    try:
        with isolated(trainer, module):
            if snapshot is not None:
                load_module(module, snapshot.model)
            found = _under_present_weights(trainer, module, entry, control, _words(snapshot))
    except CannotReplay:
        return None
    return found if found is not None and len(found.losses) == size else None


def _under_present_weights(
    trainer: Trainer, module: LightningModule, entry: RingEntry, control: RingEntry | None, words: str
) -> SampleLosses | None:
    found = per_sample_losses(trainer, module, entry.batch, entry.at.batch_idx, random=entry.rng)
    if found is None:
        return None
    usual = None
    if control is not None and found.how == "tap":
        usual = per_sample_losses(trainer, module, control.batch, control.at.batch_idx, random=control.rng)
    return SampleLosses(
        losses=tuple(found.losses.tolist()),
        control=None if usual is None else tuple(usual.losses.tolist()),
        weights=words,
    )


def _words(snapshot: Snapshot | None) -> str:
    if snapshot is None:
        return "the weights when the episode was noticed"
    return f"the snapshot from before step {snapshot.at.step}"


def _is_finite(module: LightningModule) -> bool:
    with torch.no_grad():
        return all(bool(p.isfinite().all()) for p in module.parameters())
