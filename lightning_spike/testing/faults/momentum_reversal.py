"""Momentum that points against the present gradient."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.testing.fault import Needs, Scale, optimizer_classes, param_groups
from lightning_spike.testing.settings import SettingsFault


class MomentumTooHigh(SettingsFault):
    """Momentum so high that weights move on for hundreds of steps after the gradient has turned.

    The momentum of SGD, or the first beta of Adam, becomes `strength`.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: The momentum, above 0 and below 1.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "momentum_reversal"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the momentum (or first beta)", above=0, at_most=0.9999)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.99}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.999}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.MOMENTUM})

    @override
    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if "betas" in group:
            return {"betas": (self.strength, *group["betas"][1:])}
        return {"momentum": self.strength} if group.get("momentum") else {}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super().prepare(trainer, module)
        has_momentum = any("betas" in group or group.get("momentum") for group in param_groups(trainer))
        self.require(has_momentum, Needs.MOMENTUM, optimizer_classes(trainer))
