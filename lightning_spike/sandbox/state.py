"""What a training step changes, held beside the training: to go back to, to begin from, to compare with."""

import dataclasses
from typing import Any, Self

from torch import Tensor

from lightning_spike.record.attribute_state import OwnState, copy_own, load_own
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
    """Weights, buffers, optimizers and the module's own attributes as they are before one batch.

    Clones, never aliases of what is live.
    """

    at: Moment
    """The batch before which it is."""
    weights: dict[str, Tensor]
    """Parameters and buffers by name, as `copy_module` gives them."""
    optimizers: list[dict[str, Any]]
    """One for each of `trainer.optimizers`, in the form of `Optimizer.state_dict()`."""
    own: OwnState | None = None
    """What the module keeps in attributes; `None` for as they stand."""
    gradients: dict[str, Tensor] | None = None
    """Under manual optimisation, by parameter name; under automatic optimisation every window begins without."""
    scaler: dict[str, Tensor | None] | None = None
    """Of the loss scaler, as `copy_scaler` gives it."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """That of a snapshot."""
        return cls(
            at=snapshot.at,
            weights=snapshot.model,
            optimizers=snapshot.optimizers,
            own=snapshot.own,
            gradients=snapshot.gradients,
            scaler=snapshot.scaler,
        )

    @classmethod
    def take(cls, sandbox: Sandbox, at: Moment) -> Self:
        """What is in the sandbox now; clones, on the device."""
        return cls(
            at=at,
            weights=copy_module(sandbox.module),
            optimizers=[copy_optimizer(optimizer) for optimizer in sandbox.trainer.optimizers],
            own=copy_own(sandbox.module),
            gradients=None if sandbox.module.automatic_optimization else copy_gradients(sandbox.module),
            scaler=copy_scaler(sandbox.trainer),
        )

    def load(self, sandbox: Sandbox) -> None:
        """Put it into the sandbox, in place; what schedulers write into parameter groups too.

        Averaged models that callbacks hold are no part of a training step, and not part of the isolation: they are left
        alone.
        """
        load_module(sandbox.module, self.weights)
        for optimizer, saved in zip(sandbox.trainer.optimizers, self.optimizers, strict=True):
            load_optimizer(optimizer, saved, hyperparameters=True)
        if self.own is not None:
            load_own(sandbox.module, self.own)
        if self.gradients is not None:
            load_gradients(sandbox.module, self.gradients)
        load_scaler(sandbox.trainer, self.scaler)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in tensors_in(self.weights, self.optimizers, self.gradients or {}))
