"""The input distribution moves."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import generator_for, leaves_of, replaced, token_leaves
from lightning_spike.testing.fault import LastingFault, Needs, Scale


class ValueDrift(LastingFault):
    """The values of the input move away, batch by batch.

    An augmentation whose range grows, a new camera, a normalisation that was changed.

    Contrast and level change together: `x` becomes `x * (1 + s) + s * std(x)`, where s grows from 0 to `strength` over
    `ramp` batches and stays there. Training batches only; targets stay.

    Args:
        at: The batch before the first that is moved: batches begun in the whole run before it, from 0.
        strength: The final s, in standard deviations of the input; negative values turn contrast and level down.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
        ramp: Batches until the full strength.
    """

    cause = "data_drift"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 160
    SCALE: ClassVar[Scale] = Scale(means="how far level and contrast move, in standard deviations of the input")
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 2.0, "ramp": 40}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": -3.0, "ramp": 40}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.FLOAT_INPUT})

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 40) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("ValueDrift(ramp)", ramp, at_least=1, do="Use 1 for a move at once.")
        self._options = {"ramp": self.ramp}

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        inputs = leaves_of(batch, BatchPart.INPUT, floating=True)
        leaves = self.require(inputs, Needs.FLOAT_INPUT, type(batch).__name__)
        amount = self.strength * min((ordinal - self.at + 1) / self.ramp, 1.0)
        return replaced(batch, {leaf.path: _moved(leaf.value, amount) for leaf in leaves})


class TokenDrift(LastingFault):
    """Text of another kind comes in: a new language or source, a tokenizer of another version.

    A share of the kinds of token gets another meaning, the same for the whole run: the numbers of the affected kinds
    are permuted. The share grows from 0 to `strength` over `ramp` batches. Inputs, and targets of the same shape
    (language modelling). Training batches only.

    Args:
        at: The batch before the first that is moved: batches begun in the whole run before it, from 0.
        strength: Final share of the samples that come from the new source.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the permutation and the choice of samples.
        ramp: Batches until the full strength.
    """

    cause = "data_drift"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 160
    SCALE: ClassVar[Scale] = Scale(means="the share of the samples from the new source", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5, "ramp": 40}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "ramp": 40}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.INTEGER_INPUT})

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 40) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("TokenDrift(ramp)", ramp, at_least=1, do="Use 1 for a move at once.")
        self._options = {"ramp": self.ramp}
        self._kinds: Tensor | None = None

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        tokens = self.require(token_leaves(batch), Needs.INTEGER_INPUT, type(batch).__name__)
        inputs = [leaf for leaf in tokens if leaf.part is BatchPart.INPUT]
        if self._kinds is None:
            self._kinds = torch.unique(torch.cat([leaf.value.flatten() for leaf in inputs]).clamp_min(0))
        share = self.strength * min((ordinal - self.at + 1) / self.ramp, 1.0)
        hit = torch.rand(len(inputs[0].value), generator=generator_for(self.seed, ordinal)) < share
        return replaced(batch, {leaf.path: self._moved(leaf.value, hit, self._kinds) for leaf in tokens})

    def _moved(self, value: Tensor, hit: Tensor, kinds: Tensor) -> Tensor:
        """Tokens that did not occur in the first batch keep their meaning."""
        new = kinds[torch.randperm(len(kinds), generator=generator_for(self.seed, 0)).to(kinds.device)]
        place = torch.searchsorted(kinds, value.contiguous()).clamp_max(len(kinds) - 1)
        of_samples = hit.to(value.device).reshape(-1, *[1] * (value.dim() - 1))
        return torch.where(of_samples & (kinds[place] == value), new[place], value)


def _moved(value: Tensor, amount: float) -> Tensor:
    spread = torch.nan_to_num(value.float()).std(correction=0)
    return (value * (1 + amount) + amount * spread).to(value.dtype)
