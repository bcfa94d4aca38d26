"""NaN or infinity that is in the batch already."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.errors import ConfigurationError
from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import generator_for, leaves_of, replaced, some_of
from lightning_spike.testing.fault import Fault, Needs, Scale


class NonfiniteInput(Fault):
    """NaN or Inf in the input.

    A normalisation that divided by a spread of zero, an augmentation out of its domain, a hole in a table.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Share of the numbers of the first floating-point input that become non-finite, at least one of them.
        length: Such batches in a row.
        seed: Of the choice.
        value: `"nan"` or `"inf"`.
    """

    cause = "nonfinite_input"
    SCALE: ClassVar[Scale] = Scale(means="the share of the numbers that become non-finite", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1e-9}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.05, "value": "inf"}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.FLOAT_INPUT})

    def __init__(
        self, at: int, strength: float, length: int | None = 1, seed: int = 0, value: Literal["nan", "inf"] = "nan"
    ) -> None:
        super().__init__(at, strength, length, seed)
        if value not in {"nan", "inf"}:
            raise ConfigurationError.of("NonfiniteInput(value)", expected="'nan' or 'inf'", given=value, do="Use one.")
        self.value: Literal["nan", "inf"] = value
        self._options = {"value": value}

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        inputs = leaves_of(batch, BatchPart.INPUT, floating=True)
        leaves = self.require(inputs, Needs.FLOAT_INPUT, type(batch).__name__)
        return replaced(batch, {leaves[0].path: self._spoilt(leaves[0].value, generator_for(self.seed, ordinal))})

    def _spoilt(self, value: Tensor, generator: torch.Generator) -> Tensor:
        where = some_of(value.numel(), self.strength, generator, value.device)
        return value.flatten().index_fill(0, where, float(self.value)).reshape(value.shape)
