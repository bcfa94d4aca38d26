"""Mixed precision: a loss scale that is far too large or far too small."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.amp import GradScaler
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault, Needs, OneOffFault, Scale


def _scaler(fault: OneOffFault | LastingFault, trainer: Trainer) -> GradScaler:
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return cast(GradScaler, fault.require(scaler, Needs.LOSS_SCALER, trainer.precision))


class LossScaleJumps(OneOffFault):
    """The loss scale is far too large at once: a scaler restored from another run, a growth interval of a few steps.

    Gradients overflow, and updates are skipped until the scale has been halved often enough.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: Factor on the scale.
        seed: Not used; nothing is drawn.
    """

    cause = "loss_scaling"
    SCALE: ClassVar[Scale] = Scale(means="the factor on the loss scale", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 2.0**12}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 2.0**40}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.LOSS_SCALER})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._grad_scaler = _scaler(self, trainer)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        self._grad_scaler.scale(torch.zeros((), device=module.device))  # makes the scale, where this is the first batch
        self._grad_scaler.update(self._grad_scaler.get_scale() * self.strength)
        return batch


class LossScaleHeldDown(LastingFault):
    """The loss scale is held far too low: a maximum meant for another loss, a backoff at every step.

    Small gradients underflow to 0 in half precision, so that parts of the network do not learn.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: The scale, as a share of what it was.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "loss_scaling"
    SCALE: ClassVar[Scale] = Scale(means="the loss scale, as a share of what it was", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 2.0**-30}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 2.0**-60}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.LOSS_SCALER})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._grad_scaler = _scaler(self, trainer)
        self._scale: float | None = None

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        self._grad_scaler.scale(torch.zeros((), device=module.device))  # makes the scale, where this is the first batch
        self._scale = self._scale or self._grad_scaler.get_scale() * self.strength
        self._grad_scaler.update(self._scale)
        return batch
