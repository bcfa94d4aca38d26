"""Sample weights that grow out of hand."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import number, whole_number
from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import generator_for, leaves_of, replaced, some_of
from lightning_spike.testing.fault import LastingFault, Needs, Scale


class WeightsPileUp(LastingFault):
    """Hard-example mining without a cap: the weights of some samples double and double again.

    In every batch the weights of a share of the samples are multiplied by a factor that grows geometrically from 1 to
    `strength` over `ramp` batches and stays there.

    Args:
        at: The first batch with larger weights: batches begun in the whole run before it, from 0.
        strength: The final factor.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of samples.
        ramp: Batches until the full factor.
        share: Of the samples of a batch, at least one.
    """

    cause = "sample_weight_blowup"
    SCALE: ClassVar[Scale] = Scale(means="the final factor on the weights", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 50.0, "ramp": 30}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 2000.0, "ramp": 30}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.WEIGHT})

    def __init__(
        self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 30, share: float = 0.25
    ) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("WeightsPileUp(ramp)", ramp, at_least=1, do="Use 1 for the full factor at once.")
        self.share = number("WeightsPileUp(share)", share, above=0, at_most=1, do="Use 1 for all samples.")
        self._options = {"ramp": self.ramp, "share": self.share}

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        leaves = [leaf for leaf in leaves_of(batch, BatchPart.WEIGHT, floating=True) if leaf.value.dim() > 0]
        self.require(leaves, Needs.WEIGHT, type(batch).__name__)
        factor = self.strength ** min((ordinal - self.at + 1) / self.ramp, 1.0)
        generator = generator_for(self.seed, ordinal)
        return replaced(batch, {leaf.path: self._grown(leaf.value, factor, generator) for leaf in leaves})

    def _grown(self, value: Tensor, factor: float, generator: torch.Generator) -> Tensor:
        chosen = some_of(value.shape[0], self.share, generator, value.device)
        return value.index_copy(0, chosen, value.index_select(0, chosen) * factor)
