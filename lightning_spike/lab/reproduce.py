"""Train again from a snapshot to the onset: the same batches, random states and learning rates, so that the weights at the onset are at hand."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.snapshot import Snapshot
from lightning_spike.actions.state_copy import copy_module, load_module, load_optimizer
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import Bench, loss_of

__all__ = ["Reproduction", "Settings", "reproduce", "settings_of"]

SAME: Final = 1e-3
"""Relative difference of two losses that still counts as the same: non-deterministic kernels and compiled against eager code move a loss by less, a spike by more.
On the CPU the difference is 0 (`tests/lab/test_reproduce.py`)."""

Settings = Sequence[Mapping[str, Any]]
"""Of one update, for every parameter group what schedulers write: lr, momentum, betas, weight decay."""

WRITTEN_BY_SCHEDULERS: Final = ("lr", "momentum", "betas", "weight_decay")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """How far the run could be run again."""

    weights: dict[str, Tensor]
    """Parameters and buffers as they were before the batch `reached`, as `load_module` takes them."""
    reached: int
    """Ordinal of the onset, or of an earlier batch whose gradients were not finite."""
    steps: int
    """Batches that were trained on again."""
    differs_at: int | None
    """Ordinal of the first batch, `reached` included, whose loss came out differently from the recorded one; `None` where all agree."""
    replayed: float
    """The loss of the batch `reached` in the re-run."""


def settings_of(optimizer: Optimizer) -> Settings:
    """What schedulers write into an optimizer's groups, to be taken just before its step; copies, no device read."""
    return [
        {key: _copied(group[key]) for key in WRITTEN_BY_SCHEDULERS if key in group} for group in optimizer.param_groups
    ]


def reproduce(
    bench: Bench,
    snapshot: Snapshot,
    entries: Sequence[RingEntry],
    settings: Mapping[int, Settings],
    recorded: Mapping[int, float],
) -> Reproduction:
    """Train from the snapshot up to the last of the entries, and evaluate that one.

    As Lightning's automatic optimisation does it, with the module's own hooks around backward and step, and without those of callbacks: accumulation, clipping,
    and the settings that each update was really made with. On the CPU the losses come out bit for bit. What changed the state of the run from outside
    (a callback, a fault of the machine) is not in it, and shows as a difference.

    Args:
        bench: From `isolated(..., with_optimizers=True)`; left with the weights of the end in it.
        snapshot: Where to begin.
        entries: Every batch from the snapshot's on, in order, none left out; the last is the onset.
        settings: By ordinal, of each update; see `settings_of`.
        recorded: The training losses by ordinal.

    Raises:
        CannotReplay: A loss scaler, LBFGS, a batch that is not held any more or was changed in place, or an update whose settings are not known.
    """
    optimizer = _check(bench, snapshot, entries)
    # Not `snapshot.load_into`: averaged models that callbacks hold are no part of a training step, and not part of the isolation.
    load_module(bench.module, snapshot.model)
    load_optimizer(optimizer, snapshot.optimizers[0], hyperparameters=True)
    optimizer.zero_grad()
    differs_at: int | None = None
    for k, (entry, following) in enumerate(zip(entries, [*entries[1:], None], strict=True)):
        weights = copy_module(bench.module) if following is None else {}
        loss = loss_of(bench.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at))
        if loss is None:
            msg = f"training_step returned no loss at step {entry.at.step}"
            raise CannotReplay(msg)
        value, ordinal = float(loss.detach()), entry.at.ordinal
        if differs_at is None and not _is_same(value, recorded.get(ordinal)):
            differs_at = ordinal
        if following is None:
            return Reproduction(weights=weights, reached=ordinal, steps=k, differs_at=differs_at, replayed=value)
        if not _backward(bench, optimizer, entry, loss):
            weights = copy_module(bench.module)
            return Reproduction(weights=weights, reached=ordinal, steps=k, differs_at=differs_at, replayed=value)
        bench.done_with(entry.batch)
        if following.at.step > entry.at.step:
            _update(bench, optimizer, settings.get(ordinal), entry)
    msg = "there is no batch to train on again"
    raise CannotReplay(msg)


def _check(bench: Bench, snapshot: Snapshot, entries: Sequence[RingEntry]) -> Optimizer:
    optimizers = bench.trainer.optimizers
    wanted = range(snapshot.at.ordinal, snapshot.at.ordinal + len(entries))
    if [entry.at.ordinal for entry in entries] != list(wanted):
        msg = "not all batches since the snapshot are still held"
        raise CannotReplay(msg)
    if any(entry.mutated for entry in entries):
        msg = "training_step changes the batch in place: what the batches were is not known any more"
        raise CannotReplay(msg)
    if len(optimizers) != 1 or isinstance(optimizers[0], LBFGS):
        msg = "updates are run again for a single optimizer other than LBFGS only"
        raise CannotReplay(msg)
    if getattr(bench.trainer.precision_plugin, "scaler", None) is not None:
        msg = "updates under a loss scaler are not run again: which of them it skipped is not recorded"
        raise CannotReplay(msg)
    optimizer: Optimizer = optimizers[0]
    return optimizer


def _backward(bench: Bench, optimizer: Optimizer, entry: RingEntry, loss: Tensor) -> bool:
    """As Lightning's closure; whether all gradients are finite afterwards."""
    accumulate = bench.trainer.accumulate_grad_batches
    if entry.at.batch_idx % accumulate == 0:
        bench.module.on_before_zero_grad(optimizer)
        optimizer.zero_grad()
    bench.module.backward(loss / accumulate)
    bench.module.on_after_backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()) for g in gradients)


def _update(bench: Bench, optimizer: Optimizer, settings: Settings | None, entry: RingEntry) -> None:
    if settings is None or len(settings) != len(optimizer.param_groups):
        msg = f"the learning rate of the update at step {entry.at.step} is not known"
        raise CannotReplay(msg)
    trainer = bench.trainer
    bench.module.on_before_optimizer_step(optimizer)
    bench.module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: _copied(value) for key, value in values.items()})
    optimizer.step()


def _is_same(replayed: float, recorded: float | None) -> bool:
    if recorded is None:
        return True
    if not (math.isfinite(replayed) and math.isfinite(recorded)):
        return math.isfinite(replayed) == math.isfinite(recorded)
    return math.isclose(replayed, recorded, rel_tol=SAME, abs_tol=1e-9)


def _copied(value: Any) -> Any:  # noqa: ANN401 - a number, a tensor or a tuple of them
    return value.detach().clone() if isinstance(value, Tensor) else value
