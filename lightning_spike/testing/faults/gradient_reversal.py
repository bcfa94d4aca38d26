"""Gradients that point up the loss they were made from."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.testing.alter import alter_gradients
from lightning_spike.testing.fault import LastingFault, Scale


class GradientsTurnRound(LastingFault):
    """The gradients point the other way for a stretch, and momentum carries the weights on when they are right again.

    As from an adversarial term with the wrong sign for a while, or a stretch of data that contradicts the rest. In the
    stretch the gradients are multiplied by minus strength. At its first batches momentum points against the gradient,
    and again after its last.

    Args:
        at: The first batch of the stretch: batches begun in the whole run before it, from 0.
        strength: Size of the turned gradients, as a factor.
        length: Batches in the stretch; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "gradient_reversal"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the size of the turned gradients, as a factor", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 40}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 3.0, "length": 20}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        alter_gradients(self, trainer, module, lambda gradient, _: gradient * -self.strength)
