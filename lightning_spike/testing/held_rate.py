"""`RateFault`: a learning rate that is not the planned one, for the updates of some batches, and leaves the plan as it is."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault

__all__ = ["RateFault"]


class RateFault(LastingFault):
    """Base of the faults that multiply the learning rate of every parameter group.

    The factor is on before any callback sees the batch, and off as soon as the optimizer has stepped, before a scheduler reads the rate. So the rate that
    an update uses is the planned one times the factor, whatever plan there is, and recursive schedulers do not take the factor up.
    """

    _planned: dict[int, list[Any]]

    @abstractmethod
    def factor(self, ordinal: int) -> float:
        """What the planned rate is multiplied by, in this batch."""

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._planned = {}
        for optimizer in trainer.optimizers:
            self.later(optimizer.register_step_post_hook(self._after_step).remove)
            self.later(lambda optimizer=optimizer: self._restore(optimizer))  # type: ignore[misc]

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        factor = self.factor(ordinal)
        for optimizer in trainer.optimizers:
            self._restore(optimizer)  # no step since: accumulation
            self._planned[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            self._restore(optimizer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        for group, planned in zip(optimizer.param_groups, self._planned.pop(id(optimizer), []), strict=False):
            group["lr"] = planned
