"""What a training step changes, held beside the training: to go back to, to begin from, to compare with."""

import dataclasses
from typing import Any, Self

from torch import Tensor

from lightning_spike.actions.snapshot import Snapshot
from lightning_spike.actions.state_copy import copy_module, copy_optimizer, load_module, load_optimizer, tensors_in
from lightning_spike.lab.isolation import Bench
from lightning_spike.records import Moment

__all__ = ["TrainState"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """Weights, buffers and optimizers as they are before one batch; clones, never aliases of what is live."""

    at: Moment
    """The batch before which it is."""
    weights: dict[str, Tensor]
    """Parameters and buffers by name, as `copy_module` gives them."""
    optimizers: list[dict[str, Any]]
    """One for each of `trainer.optimizers`, in the form of `Optimizer.state_dict()`."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """That of a snapshot."""
        return cls(at=snapshot.at, weights=snapshot.model, optimizers=snapshot.optimizers)

    @classmethod
    def take(cls, bench: Bench, at: Moment) -> Self:
        """What is in the bench now; clones, on the device."""
        return cls(
            at=at,
            weights=copy_module(bench.module),
            optimizers=[copy_optimizer(optimizer) for optimizer in bench.trainer.optimizers],
        )

    def load(self, bench: Bench) -> None:
        """Put it into the bench, in place; what schedulers write into parameter groups too.

        Averaged models that callbacks hold are no part of a training step, and not part of the isolation: they are left alone.
        """
        load_module(bench.module, self.weights)
        for optimizer, saved in zip(bench.trainer.optimizers, self.optimizers, strict=True):
            load_optimizer(optimizer, saved, hyperparameters=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in tensors_in(self.weights, self.optimizers))
