"""One update, made again: the batches of an accumulation window, and what the optimizer was set to; or with something about it changed."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.state_copy import load_optimizer
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import Bench, loss_of

__all__ = ["Made", "Settings", "Update", "check_updates", "make_update", "settings_of", "updates_of"]

Settings = Sequence[Mapping[str, Any]]
"""Of one optimizer step, for every parameter group what schedulers write: lr, momentum, betas, weight decay."""

WRITTEN_BY_SCHEDULERS: Final = ("lr", "momentum", "betas", "weight_decay")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """What one update was made with. A factor is changed by `dataclasses.replace`."""

    entries: tuple[RingEntry, ...]
    """The batches whose gradients it was made of, in order."""
    settings: tuple[Settings, ...]
    """One for each optimizer step in it, in order; what is in them is written into the parameter groups before the step."""
    optimizers: list[dict[str, Any]] | None = None
    """The states that the optimizers are given before it; `None` for as they stand."""
    clip: float | None = None
    """The total norm that gradients are clipped to on top of what the run itself does; `None` for nothing."""
    in_float32: bool = False
    """Without autocast."""

    @property
    def ordinal(self) -> int:
        """Ordinal of the batch that closes it: its damage shows from the batch after that on."""
        return self.entries[-1].at.ordinal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """How an update went."""

    losses: tuple[float, ...]
    """Of its batches, undivided."""
    gradients: dict[str, Tensor]
    """By parameter name, complete and not yet clipped; clones."""
    spoilt_at: int | None
    """Place of the first of its batches after whose backward pass a gradient was not finite; no step was made then. `None` where all went well."""


def settings_of(optimizer: Optimizer) -> Settings:
    """What schedulers write into an optimizer's groups, to be taken just before its step; copies, no device read."""
    return [
        {key: _copied(group[key]) for key in WRITTEN_BY_SCHEDULERS if key in group} for group in optimizer.param_groups
    ]


def updates_of(entries: Sequence[RingEntry], settings: Mapping[int, Sequence[Settings]]) -> list[Update]:
    """Cut a run of batches into updates: each ends with the batch after which `global_step` had moved on.

    Args:
        entries: Batches in order, none left out. The last is where the run of updates ends, and belongs to none of them.
        settings: Of the optimizer steps, by the ordinal of the batch they were made in.
    """
    out: list[Update] = []
    window: list[RingEntry] = []
    for entry, following in pairwise(entries):
        window.append(entry)
        if following.at.step > entry.at.step:
            out.append(Update(entries=tuple(window), settings=tuple(settings.get(entry.at.ordinal, ()))))
            window = []
    return out


def check_updates(trainer: Trainer) -> None:
    """Refuse what cannot be made again.

    Raises:
        CannotReplay: LBFGS (it runs the step several times), several optimizers, or a loss scaler.
    """
    if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
        msg = "updates are run again for a single optimizer other than LBFGS only"
        raise CannotReplay(msg)
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        msg = "updates under a loss scaler are not run again: which of them it skipped is not recorded"
        raise CannotReplay(msg)


def make_update(bench: Bench, update: Update) -> Made:
    """Make one update with what is in the bench, as Lightning's automatic optimisation does it.

    With the module's own hooks around backward and step and without those of callbacks: accumulation, clipping, and the settings that the update was
    really made with. On the CPU losses and weights come out bit for bit. Blocks.

    Raises:
        CannotReplay: The settings of the update are not known, or `training_step` returned no loss.
    """
    (optimizer,) = bench.trainer.optimizers
    if len(update.settings) != 1 or len(update.settings[0]) != len(optimizer.param_groups):
        msg = f"the learning rate of the update at step {update.entries[-1].at.step} is not known"
        raise CannotReplay(msg)
    if update.optimizers is not None:
        load_optimizer(optimizer, update.optimizers[0], hyperparameters=True)
    losses: list[float] = []
    for entry in update.entries:
        losses.append(_backward(bench, optimizer, entry, in_float32=update.in_float32))
        bench.done_with(entry.batch)
        if not _gradients_are_finite(optimizer):
            return Made(losses=tuple(losses), gradients={}, spoilt_at=len(losses) - 1)
    named = bench.module.named_parameters()
    gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    _step(bench, optimizer, update)
    return Made(losses=tuple(losses), gradients=gradients, spoilt_at=None)


def _gradients_are_finite(optimizer: Optimizer) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()) for g in gradients)


def _backward(bench: Bench, optimizer: Optimizer, entry: RingEntry, *, in_float32: bool) -> float:
    """As Lightning's closure."""
    accumulate = bench.trainer.accumulate_grad_batches
    outputs = bench.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at, in_float32=in_float32)
    loss = loss_of(outputs)
    if loss is None:
        msg = f"training_step returned no loss at step {entry.at.step}"
        raise CannotReplay(msg)
    if entry.at.batch_idx % accumulate == 0:
        bench.module.on_before_zero_grad(optimizer)
        optimizer.zero_grad()
    bench.module.backward(loss / accumulate)
    bench.module.on_after_backward()
    return float(loss.detach())


def _step(bench: Bench, optimizer: Optimizer, update: Update) -> None:
    trainer = bench.trainer
    bench.module.on_before_optimizer_step(optimizer)
    if update.clip is not None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], update.clip)
    bench.module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
    for group, values in zip(optimizer.param_groups, update.settings[0], strict=True):
        group.update({key: _copied(value) for key, value in values.items()})
    optimizer.step()


def _copied(value: Any) -> Any:  # noqa: ANN401 - a number, a tensor or a tuple of them
    return value.detach().clone() if isinstance(value, Tensor) else value
