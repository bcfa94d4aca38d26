"""The state that a training step changes, to restore and to compare."""

import dataclasses
from typing import Any, Self

from torch import Tensor

from lightning_spike.record.attribute_state import AttributeState, copy_attributes, load_attributes
from lightning_spike.record.snapshot import Snapshot
from lightning_spike.record.state_copy import (
    copy_gradients,
    copy_module,
    copy_optimizer,
    copy_scaler,
    load_gradients,
    load_module,
    load_optimizer,
    load_scaler,
    tensors_in,
)
from lightning_spike.records import Moment
from lightning_spike.sandbox.isolation import Sandbox


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """Clones of weights, buffers, optimizers and module attributes before one batch."""

    at: Moment
    """The next batch."""
    weights: dict[str, Tensor]
    """Parameters and buffers by name, as `copy_module` gives them."""
    optimizers: list[dict[str, Any]]
    """One for each of `trainer.optimizers`, in the form of `Optimizer.state_dict()`."""
    own: AttributeState | None = None
    """Module attributes; `None` for the present ones."""
    gradients: dict[str, Tensor] | None = None
    """Gradients by parameter name, under manual optimisation."""
    scaler: dict[str, Tensor | None] | None = None
    """From `copy_scaler`."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """The state of a snapshot."""
        shared = {name: getattr(snapshot, name) for name in ("at", "optimizers", "own", "gradients", "scaler")}
        return cls(weights=snapshot.model, **shared)

    @classmethod
    def take(cls, sandbox: Sandbox, at: Moment) -> Self:
        """Clone the present state of the sandbox, on the device."""
        return cls(
            at=at,
            weights=copy_module(sandbox.module),
            optimizers=[copy_optimizer(optimizer) for optimizer in sandbox.trainer.optimizers],
            own=copy_attributes(sandbox.module),
            gradients=None if sandbox.module.automatic_optimization else copy_gradients(sandbox.module),
            scaler=copy_scaler(sandbox.trainer),
        )

    def load(self, sandbox: Sandbox) -> None:
        """Restore the state in the sandbox, in place, with scheduled settings but no averaged models."""
        load_module(sandbox.module, self.weights)
        for optimizer, saved in zip(sandbox.trainer.optimizers, self.optimizers, strict=True):
            load_optimizer(optimizer, saved, hyperparameters=True)
        if self.own is not None:
            load_attributes(sandbox.module, self.own)
        if self.gradients is not None:
            load_gradients(sandbox.module, self.gradients)
        load_scaler(sandbox.trainer, self.scaler)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in tensors_in(self.weights, self.optimizers, self.gradients or {}))
