"""`RateFault`: a learning rate that is not the planned one, for the updates of some batches, and leaves the plan as it is."""

import functools
from abc import abstractmethod
from typing import Any, Final
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault

_PLANNED: Final[WeakKeyDictionary[Optimizer, list[Any]]] = WeakKeyDictionary()
"""The planned rates of the optimizers that have another one now, shared by all faults of a run, so that several
multiply and the first to end restores."""


class RateFault(LastingFault):
    """Base of the faults that multiply the learning rate of every parameter group.

    The factor is on before any callback sees the batch, and off as soon as the optimizer has stepped, before a
    scheduler reads the rate. So the rate that an update uses is the planned one times the factor, whatever plan there
    is, and recursive schedulers do not take the factor up.
    """

    @abstractmethod
    def factor(self, ordinal: int) -> float:
        """What the planned rate is multiplied by, in this batch."""

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.later(optimizer.register_step_post_hook(self._after_step).remove)
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

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        _restore(optimizer)


def _restore(optimizer: Optimizer) -> None:
    for group, planned in zip(optimizer.param_groups, _PLANNED.pop(optimizer, []), strict=False):
        group["lr"] = planned
