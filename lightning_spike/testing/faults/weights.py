"""Weights that are extreme: from the beginning, or because they grew."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.fault import Needs, OneOffFault, Scale, optimizer_classes, param_groups
from lightning_spike.testing.settings import SettingsFault


class InitialWeightsScaled(OneOffFault):
    """A bad initialisation: a standard deviation of 1 where a small one was meant, a fan counted wrongly.

    Before the first batch every parameter with two or more dimensions is multiplied. A fit that is resumed is left
    alone.

    Args:
        at: 0, the beginning of the run: there is no initialisation later.
        strength: Factor on the initial weights; below 1 they are too small.
        seed: Not used; nothing is drawn.

    Raises:
        ConfigurationError: `at` is not 0.
    """

    cause = "bad_initialization"
    TYPICAL_ONSET = 0
    TYPICAL_DURATION = 300
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the factor on the initial weights", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 8.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 50.0}

    def __init__(self, at: int, strength: float, seed: int = 0) -> None:
        super().__init__(at, strength, seed)
        if self.at != 0:
            raise ConfigurationError.of(
                "InitialWeightsScaled(at)", expected="0", given=at, do="Use WeightsGrow or WeightsOverwritten later on."
            )

    @override
    @torch.no_grad()
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(self.strength)


class WeightsGrow(SettingsFault):
    """Weights grow (or shrink) with every update until they are extreme.

    A sign mistake in the weight decay, or a decay far too strong.

    The weight decay of every group becomes such that the optimizer's own update multiplies the weights by `strength`,
    at the learning rate that is in use at the batch `at` (for SGD with momentum once that has built up). Optimizers
    that divide the decay by the second moment (torch's Adam of old) do less.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: Factor on the weights for each update; below 1 they shrink.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "weight_blowup"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the factor on the weights for each update", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.03}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.15}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.WEIGHT_DECAY})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super().prepare(trainer, module)
        has_decay = any("weight_decay" in group for group in param_groups(trainer))
        self.require(has_decay, Needs.WEIGHT_DECAY, optimizer_classes(trainer))

    @override
    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        rate = float(group["lr"])
        if "weight_decay" not in group or rate == 0:
            return {}
        decay = (1 - self.strength) / rate
        if "decoupled_weight_decay" in group:
            return {"weight_decay": decay, "decoupled_weight_decay": True}
        return {"weight_decay": decay * (1 - group.get("momentum", 0.0))}
