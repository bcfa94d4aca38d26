"""Faults that no cause of the catalogue covers: the right diagnosis is "unexplained"."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.testing.alter import alter_loss
from lightning_spike.testing.batch_edit import generator_for
from lightning_spike.testing.fault import Fault, LastingFault, Needs, Scale
from lightning_spike.testing.layers import Layers, on_output


class LossMultiplied(Fault):
    """The loss itself is multiplied by the user's code for some steps, with ordinary data, weights and rates.

    A term in other units, a sum for a mean.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Factor on the loss.
        length: Such batches in a row; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the factor on the loss", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1000.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.AUTOMATIC_OPTIMIZATION})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        alter_loss(self, trainer, module, lambda loss: loss * self.strength)


class PenaltySwitchedOn(LastingFault):
    """A term of the loss is switched on in the middle of the run, as planned by its author.

    Half the sum of the squares of all weights.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: Factor on the term.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the factor on the penalty", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.01}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.1}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.AUTOMATIC_OPTIMIZATION})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        def penalised(loss: Tensor) -> Tensor:
            squares = torch.stack([p.square().sum() for p in module.parameters() if p.requires_grad])
            return loss + 0.5 * self.strength * squares.sum()

        alter_loss(self, trainer, module, penalised)


class DropoutSurge(LastingFault):
    """Regularisation goes up in the middle of the run, as planned by its author: dropout after every hidden layer.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: Share of the outputs that are dropped.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of outputs.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the share of the outputs that are dropped", above=0, at_most=0.99)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.8}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.HIDDEN_LAYERS})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._layers = Layers(self, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        parts = self.require(self._layers.hidden(), Needs.HIDDEN_LAYERS, type(module).__name__)
        for number, part in enumerate(parts):

            def dropped(output: Tensor, number: int = number) -> Tensor:
                if not (module.training and self.is_on(trainer)):
                    return output
                generator = generator_for(self.seed + number, trainer.global_step)
                kept = torch.rand(output.shape, generator=generator) >= self.strength
                return output * kept.to(output) / (1 - self.strength)

            self.later(on_output(part, dropped))
