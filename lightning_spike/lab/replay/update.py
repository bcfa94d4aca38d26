"""One update, made again.

The batches of an accumulation window, and what the optimizer was set to; or with something about it changed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.errors import CannotReplay
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_optimizer
from lightning_spike.record.update_settings import CLIP, PLACE, Settings, copied
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.signals.loss import batch_losses, total_loss


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """The inputs of one update; experiments change one by `dataclasses.replace`."""

    entries: tuple[RingEntry, ...]
    """The batches whose gradients it was made of, in order."""
    settings: tuple[Settings, ...]
    """One for each optimizer step in it, in order; what is in them is written into the parameter groups before the
    step."""
    optimizers: list[dict[str, Any]] | None = None
    """The states that the optimizers are given before it; `None` for as they stand."""
    clip: float | None = None
    """The total norm that gradients are clipped to on top of what the run itself does; `None` for nothing."""
    in_float32: bool = False
    """Whether to run without autocast."""

    @property
    def ordinal(self) -> int:
        """Ordinal of the batch that closes it: its damage shows from the batch after that on."""
        return self.entries[-1].at.ordinal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UpdateOutcome:
    """The outcome of an update."""

    losses: tuple[float, ...]
    """Of its batches, undivided; the sum where a batch has several backward passes under manual optimisation; with
    several ranks the mean over them."""
    gradients: dict[str, Tensor]
    """By parameter name, complete, and not yet clipped (under manual optimisation as they were when the optimizer
    stepped); clones."""
    spoilt_at: int | None
    """Place of the first of its batches after whose backward pass a gradient was not finite; no step was made then,
    except under manual optimisation, where the step is the module's. `None` where all went well, and under a loss
    scaler, which sees to it itself."""
    named_losses: tuple[Mapping[str, float], ...] = ()
    """The losses of its batches by the names of their signals; with several ranks this one's."""


def updates_of(
    entries: Sequence[RingEntry], settings: Mapping[int, Sequence[Settings]], *, by_hand: bool = False
) -> list[Update]:
    """Cut a run of batches into updates: each ends with the batch after which `global_step` had moved on.

    Args:
        entries: Batches in order, none left out. The last is where the run of updates ends, and belongs to none of
            them.
        settings: Of the optimizer steps, by the ordinal of the batch they were made in.
        by_hand: Manual optimisation: each batch is one, for its `training_step` makes the updates, several or none.
    """
    if by_hand:
        return [Update(entries=(entry,), settings=tuple(settings.get(entry.at.ordinal, ()))) for entry in entries[:-1]]
    out: list[Update] = []
    window: list[RingEntry] = []
    for entry, following in pairwise(entries):
        window.append(entry)
        if following.at.step > entry.at.step:
            out.append(Update(entries=tuple(window), settings=tuple(settings.get(entry.at.ordinal, ()))))
            window = []
    return out


def make_update(sandbox: Sandbox, update: Update) -> UpdateOutcome:
    """Makes one update in the sandbox through Lightning's own loop (`Sandbox.train`).

    With the module's own hooks and without those of callbacks: accumulation, clipping, and the settings that the update
    was really made with. On the CPU losses and weights come out bit for bit. Blocks. With several ranks each must call
    it with its own batches.

    Raises:
        CannotReplay: The settings of the update are not known, or `training_step` returned no loss.
    """
    trainer = sandbox.trainer
    _check_settings(sandbox, update)
    if update.optimizers is not None:
        for optimizer, state in zip(trainer.optimizers, update.optimizers, strict=True):
            load_optimizer(optimizer, state, hyperparameters=True)
    listener = _Listener(sandbox, update)
    losses: list[Mapping[str, float]] = []
    for entry in update.entries:
        spoilt = _train(sandbox, entry, update, listener, losses)
        sandbox.release_batch(entry.batch)
        if spoilt:
            break
    mine = [_whole(named, entry) for named, entry in zip(losses, update.entries, strict=False)]
    whole = tuple(sandbox.ranks.mean("losses of an update", mine).tolist())
    spoilt_at = len(losses) - 1 if listener.is_spoilt else None
    return UpdateOutcome(losses=whole, gradients=listener.gradients, spoilt_at=spoilt_at, named_losses=tuple(losses))


class _Spoilt(Exception):  # noqa: N818 - it only leads out of Lightning's loop
    """A gradient is not finite: the step is not to be made."""


class _Listener(Callback):
    """The only callback while an update is made again.

    Sets what the optimizers were set to, and takes down losses and gradients.

    It is called where the callbacks of the run were when they took down what it now sets.
    """

    def __init__(self, sandbox: Sandbox, update: Update) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.backward_losses: list[Tensor] = []
        self.is_spoilt = False
        self._settings = list(update.settings)
        self._clip = update.clip
        self._ranks = sandbox.ranks
        self._by_hand = not sandbox.module.automatic_optimization
        self._is_scaled = getattr(sandbox.trainer.precision_plugin, "scaler", None) is not None
        self._names = {parameter: name for name, parameter in sandbox.module.named_parameters()}

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._ranks.barrier("before a backward pass")
        if loss.numel() == 1:
            self.backward_losses.append(loss.detach())

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_scaled:
            return
        is_finite = _are_finite(p.grad for p in self._names if p.grad is not None)
        self.is_spoilt |= self._ranks.any("spoilt gradients", mine=not is_finite)
        if self.is_spoilt and not self._by_hand:
            raise _Spoilt

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradients |= {self._names[p]: p.grad.detach().clone() for p in parameters if p in self._names}
        if not self._settings:
            msg = "an optimizer steps more often in the replay than it did in the training"
            raise CannotReplay(msg)
        settings = self._settings.pop(0)
        _set_clip(trainer, settings)
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update({key: copied(value) for key, value in values.items() if key not in (PLACE, CLIP)})
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._clip)


def _train(
    sandbox: Sandbox, entry: RingEntry, update: Update, listener: _Listener, losses: list[Mapping[str, float]]
) -> bool:
    """Train on one batch and take down its losses; true if the update ends here, since a gradient is not finite."""
    listener.backward_losses.clear()
    automatic = sandbox.module.automatic_optimization
    outputs: object = None
    spoilt = False
    try:
        outputs = sandbox.train(
            entry.batch,
            entry.at.batch_idx,
            random=entry.rng,
            at=entry.at,
            closes=entry is update.entries[-1],
            listener=listener,
            in_float32=update.in_float32,
        )
    except _Spoilt:
        spoilt = True
    backward = (
        [loss * sandbox.trainer.accumulate_grad_batches for loss in listener.backward_losses]
        if automatic
        else listener.backward_losses
    )
    named = batch_losses(
        outputs,
        backward if spoilt or not automatic else (),
        divided_by=sandbox.trainer.accumulate_grad_batches if automatic else 1,
    )
    losses.append({name: float(value) for name, value in named.items()})
    return spoilt or listener.is_spoilt


def _check_settings(sandbox: Sandbox, update: Update) -> None:
    """Under automatic optimisation there is a step, so its settings must be there; by hand there may be none."""
    if sandbox.module.automatic_optimization and not update.settings:
        msg = f"the learning rate of the update at step {update.entries[-1].at.step} is not known"
        raise CannotReplay(msg)
    for settings in update.settings:
        if settings and len(settings) != len(sandbox.trainer.optimizers[settings[0].get(PLACE, 0)].param_groups):
            msg = f"the parameter groups of the update at step {update.entries[-1].at.step} were others"
            raise CannotReplay(msg)


def _whole(named: Mapping[str, float], entry: RingEntry) -> float:
    total = total_loss(named)
    if total is None:
        msg = f"training_step returned no loss at step {entry.at.step}"
        raise CannotReplay(msg)
    return total


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all are; one read of the device for each device."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if values.numel():
            groups.setdefault(values.device, []).append(values)
    # as torch's own clipping does
    largest = [torch.stack(torch._foreach_norm(group, math.inf)).float().sum() for group in groups.values()]
    return all(math.isfinite(float(value)) for value in largest)


def _set_clip(trainer: Trainer, settings: Settings) -> None:
    """Lightning clips after this; under manual optimisation the module has clipped already, by whatever it says."""
    if settings and CLIP in settings[0]:
        value, algorithm = settings[0][CLIP]
        trainer.gradient_clip_val = value
        trainer.gradient_clip_algorithm = None if algorithm is None else GradClipAlgorithmType(algorithm)
