"""Length of updates, measured around the optimizer's step on a bounded number of elements."""

import dataclasses
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.signals.gradients import tensor_norms
from lightning_spike.signals.subset import is_readable, subset
from lightning_spike.signals.weights import Displacement, displacement

UPDATE_NORM = "update_norm"
NO_UPDATE = "update_norm/none"
"""1 if no weight changed despite a gradient and a learning rate, else 0."""
NOT_MEASURED = -1.0
"""Norm of a parameter outside of this update."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """State before an update."""

    parameters: list[Tensor]
    copies: list[Tensor]
    gradient: Tensor
    """Norm of a subset of the gradients; only whether it is 0 matters."""
    has_rate: bool


class UpdateMeter(Participant):
    """Records `update_norm`, the L2 norm of the change of all weights and of each parameter, and `update_norm/none`.

    The shortest interval asked for counts. Of a parameter with more than 16,384 elements, a subset is copied before the
    step and compared after it. Updates that a gradient scaler skips are not measured. No device read.
    """

    def __init__(self) -> None:
        self.every = sys.maxsize
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._places: dict[int, int] = {}
        self._updates: dict[int, int] = {}
        self._highest_rate = 0.0
        self._before: dict[int, _Before] = {}
        self._measured: dict[int, tuple[_Before, Displacement]] = {}
        self._error: Exception | None = None

    def measure_every(self, updates: int) -> None:
        """Measure at least every `updates` updates of each optimizer, the first included."""
        self.every = min(self.every, updates)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        named = [(n.replace("_orig_mod.", ""), p) for n, p in module.named_parameters() if is_readable(p)]
        self._places = {id(p): place for place, (_, p) in enumerate(named)}
        self.flight.store.layer_names[UPDATE_NORM] = tuple(name for name, _ in named)
        self._handles = [o.register_step_post_hook(self._stepped) for o in trainer.optimizers]

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._before, self._measured = {}, {}

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        key = id(optimizer)
        count = self._updates[key] = self._updates.get(key, -1) + 1
        if count % self.every:
            return
        parameters = [p for g in optimizer.param_groups for p in g["params"] if id(p) in self._places]
        gradients = [subset(p.grad) for p in parameters if p.grad is not None and is_readable(p.grad)]
        if gradients:
            self._before[key] = _Before(
                parameters=parameters,
                copies=[subset(p).clone() for p in parameters],
                gradient=torch.linalg.vector_norm(torch.stack(tensor_norms(gradients))),
                has_rate=self._has_rate(optimizer),
            )

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self._before = {}
        if self._error is not None:
            self.release()
            raise self._error
        if not self._measured:
            return
        moved = [change for _, change in self._measured.values()]
        total = moved[0].total if len(moved) == 1 else torch.linalg.vector_norm(torch.stack([m.total for m in moved]))
        self.flight.recorder.put(UPDATE_NORM, total)
        self.flight.recorder.put_vector(UPDATE_NORM, self._laid_out(total.device))
        stuck = [
            (change.total == 0) & (before.gradient > 0) for before, change in self._measured.values() if before.has_rate
        ]
        if stuck:
            self.flight.recorder.put(NO_UPDATE, torch.stack(stuck).any().float())

    @override
    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before, self._measured, self._places = {}, {}, {}

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Measure an update; called by torch inside the user's step, so it must not raise."""
        del args, kwargs
        before = self._before.pop(id(optimizer), None)
        if before is None or torch.compiler.is_compiling():
            return
        try:
            self._measured[id(optimizer)] = before, displacement(before.copies, before.parameters)
        except Exception as error:  # noqa: BLE001 - raised in our own phase, where it switches us off
            self._error = error

    def _has_rate(self, optimizer: Optimizer) -> bool:
        """Whether a group's learning rate is above 0.1 % of the highest; false if unknown."""
        rate = max((g["lr"] for g in optimizer.param_groups if isinstance(g.get("lr"), float)), default=0.0)
        self._highest_rate = max(self._highest_rate, rate)
        return rate > self._highest_rate * 1e-3  # a smaller update can be lost in rounding

    def _laid_out(self, device: torch.device) -> Tensor:
        norms = [torch.full((), NOT_MEASURED, device=device)] * len(self._places)
        for before, change in self._measured.values():
            for parameter, norm in zip(before.parameters, change.norms.unbind(), strict=True):
                norms[self._places[id(parameter)]] = norm.to(device, non_blocking=True)
        return torch.stack(norms)
