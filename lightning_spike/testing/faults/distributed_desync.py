"""Ranks that no longer hold the same weights."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.batch_edit import add_noise, generator_for
from lightning_spike.testing.fault import LastingFault, Needs, OneOffFault, Scale


class RankDrifts(OneOffFault):
    """The weights of one rank move away from those of the others.

    User code that runs on rank 0 only, a broadcast that was left out.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: Noise added to the weights of that rank, over the root mean square of each parameter.
        seed: Of the noise.
        rank: Which rank.
    """

    cause = "distributed_desync"
    SCALE: ClassVar[Scale] = Scale(means="the noise over the root mean square of each parameter", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.1}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 3.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.RANKS})

    def __init__(self, at: int, strength: float, seed: int = 0, rank: int = 1) -> None:
        super().__init__(at, strength, seed)
        self.rank = whole_number("RankDrifts(rank)", rank, at_least=0, do="Use the global rank.")
        self._options = {"rank": self.rank}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self.require(trainer.world_size > max(self.rank, 1), Needs.RANKS, trainer.world_size)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        if trainer.global_rank == self.rank:
            add_noise(module, self.strength, generator_for(self.seed, ordinal))
        return batch


class GradientsNotAveraged(LastingFault):
    """The gradients of the ranks are not averaged.

    Examples: `no_sync` around the last micro-batch too, a module called past its DDP wrapper.

    Args:
        at: The first batch without averaging: batches begun in the whole run before it, from 0.
        strength: Share of the batches without averaging; drawn by the seed, the same on all ranks.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of batches.
    """

    cause = "distributed_desync"
    SCALE: ClassVar[Scale] = Scale(means="the share of the batches without averaging", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.3}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.RANKS})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self.require(trainer.world_size > 1, Needs.RANKS, trainer.world_size)
        model = trainer.strategy.model
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise ConfigurationError.of(
                "Trainer(strategy=...)",
                expected="a DDP strategy",
                given=type(trainer.strategy).__name__,
                do="GradientsNotAveraged switches DDP's averaging off: leave it out here.",
            )
        self._model = model
        self.later(self._average_again)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        drawn = float(torch.rand((), generator=generator_for(self.seed, ordinal)))
        self._model.require_backward_grad_sync = drawn >= self.strength
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._average_again()

    def _average_again(self) -> None:
        self._model.require_backward_grad_sync = True
