"""An optimizer's state that is changed other than by its own step."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.batch_edit import generator_for
from lightning_spike.testing.fault import Needs, OneOffFault, Scale, optimizer_classes

SECOND_MOMENTS: Final[Mapping[str, int]] = {
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
    "exp_inf": 1,
}
"""Names of torch's optimizers for averages of gradients to this power, which updates are divided by."""

COUNTS: Final = frozenset({"mu_product", "step"})
"""State that is no average."""


class StateRescaled(OneOffFault):
    """The optimizer's state is off by a factor.

    A shard restored in other units, a state divided by the world size twice.

    Momenta are multiplied by strength, so that the next updates are about strength times too large, in the direction
    that they would have had. In an optimizer that has no momentum, averages of squares are divided by strength squared
    instead, to the same end.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: Factor on the next updates.
        seed: Not used; nothing is drawn.
    """

    cause = "optimizer_state_corruption"
    SCALE: ClassVar[Scale] = Scale(means="the factor by which the next updates are too large", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.MOMENTUM})

    @override
    @torch.no_grad()
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        state = self._state(trainer)
        momenta = [value for name, value in state if name not in SECOND_MOMENTS]
        for value in momenta:
            value.mul_(self.strength)
        for name, value in state:
            if not momenta:
                value.div_(self.strength ** SECOND_MOMENTS[name])
        return batch

    def _state(self, trainer: Trainer) -> list[tuple[str, Tensor]]:
        found = [pair for optimizer in trainer.optimizers for pair in _averages(optimizer)]
        return self.require(found, Needs.MOMENTUM, optimizer_classes(trainer))


class StateScrambled(StateRescaled):
    """The optimizer's state belongs to other parameters.

    A state restored in another order of the parameters, a torn write.

    In every momentum the entries change places at random, and it is multiplied by strength; averages of squares are
    left alone.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: Factor on the scrambled momenta.
        seed: Of the scrambling.
    """

    MILD: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0}
    SCALE: ClassVar[Scale] = Scale(means="the factor on the scrambled momenta", above=0)

    @override
    @torch.no_grad()
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        generator = generator_for(self.seed, ordinal)
        for name, value in self._state(trainer):
            if name not in SECOND_MOMENTS:
                order = torch.randperm(value.numel(), generator=generator).to(value.device)
                value.copy_((value.flatten()[order] * self.strength).reshape(value.shape))
        return batch


def _averages(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's averages of past gradients, without step counts, by torch's names."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name not in COUNTS:
                yield name, value
