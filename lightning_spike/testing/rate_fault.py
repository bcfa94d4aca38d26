"""`RateFault`: multiplies the learning rate of some updates and leaves the schedule unchanged."""

import functools
from abc import abstractmethod
from typing import Any, Final
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault

_PLANNED: Final[WeakKeyDictionary[Optimizer, list[Any]]] = WeakKeyDictionary()
"""Planned rates of optimizers with a changed one, shared by the faults of a run: several factors multiply."""


class RateFault(LastingFault):
    """Base of the faults that multiply the learning rate of every parameter group.

    The factor is applied before any callback sees the batch and removed right after the optimizer's step, before a
    scheduler reads the rate. So each update uses the scheduled rate times the factor, with any schedule, and recursive
    schedulers do not accumulate the factor.
    """

    @abstractmethod
    def factor(self, ordinal: int) -> float:
        """The factor on the planned rate in this batch."""

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.later(optimizer.register_step_post_hook(lambda stepped, *_: _restore(stepped)).remove)
            self.later(functools.partial(_restore, optimizer))

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        factor = self.factor(ordinal)
        for optimizer in trainer.optimizers:
            _PLANNED.setdefault(optimizer, [group["lr"] for group in optimizer.param_groups])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            _restore(optimizer)  # where it has not stepped: accumulation, an overflow
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _restore(optimizer: Optimizer) -> None:
    for group, planned in zip(optimizer.param_groups, _PLANNED.pop(optimizer, []), strict=False):
        group["lr"] = planned
