"""Extreme or corrupt values in one or a few batches."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import number
from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import (
    generator_for,
    leaves_of,
    number_of_samples,
    replaced,
    some_of,
    token_leaves,
)
from lightning_spike.testing.fault import Fault, Needs, Scale


class ExtremeValues(Fault):
    """Values far out of range.

    A corrupt file in the shard, a sensor that spikes, pixels that were never divided by 255.

    Noise of so many standard deviations of the input itself is added to a share of the samples; the targets stay. It is
    noise and not a factor, since a network that begins with a normalisation takes a factor on the whole batch out
    again.

    Args:
        at: The first bad batch: batches begun in the whole run before it, from 0.
        strength: Standard deviation of the noise, in standard deviations of the input in this batch.
        length: Bad batches in a row.
        seed: Of the noise and of the choice of samples.
        share: Of the samples of a batch, at least one; 1 is all.
    """

    cause: ClassVar[str | None] = "bad_batch"
    SCALE: ClassVar[Scale] = Scale(means="the noise, in standard deviations of the input", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 4.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 40.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.FLOAT_INPUT})

    def __init__(self, at: int, strength: float, length: int | None = 1, seed: int = 0, share: float = 1.0) -> None:
        super().__init__(at, strength, length, seed)
        self.share = number("ExtremeValues(share)", share, above=0, at_most=1, do="Use 1 for all samples.")
        self._options = {"share": self.share}

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        inputs = leaves_of(batch, BatchPart.INPUT, floating=True)
        leaves = self.require(inputs, Needs.FLOAT_INPUT, type(batch).__name__)
        generator, samples = generator_for(self.seed, ordinal), number_of_samples(batch)
        chosen = some_of(samples, self.share, generator)
        return replaced(batch, {leaf.path: self._noisy(leaf.value, chosen, samples, generator) for leaf in leaves})

    def _noisy(self, value: Tensor, chosen: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        spread = torch.nan_to_num(value.float()).std(correction=0).clamp_min(1e-6)
        noise = torch.randn(value.shape, generator=generator).to(value.device) * spread * self.strength
        if value.dim() and value.shape[0] == samples:
            mask = torch.zeros(samples, device=value.device).index_fill(0, chosen.to(value.device), 1.0)
            noise = noise * mask.reshape(-1, *[1] * (value.dim() - 1))
        return (value + noise).to(value.dtype)


class CorruptTokens(Fault):
    """Tokens that are none: an archive read as text, a wrong tokenizer, a torn record.

    A share of the tokens of the batch is replaced by whole numbers drawn evenly between the smallest and the largest
    token of the batch; and so are as many of the targets where they have the shape of the input, as in language
    modelling, where targets are tokens of the same corrupt file.

    Args:
        at: The first bad batch: batches begun in the whole run before it, from 0.
        strength: Share of the tokens replaced, above 0, at most 1.
        length: Bad batches in a row.
        seed: Of the choice and of the new tokens.
    """

    cause: ClassVar[str | None] = "bad_batch"
    SCALE: ClassVar[Scale] = Scale(means="the share of the tokens that are replaced", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.INTEGER_INPUT})

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        tokens = self.require(token_leaves(batch), Needs.INTEGER_INPUT, type(batch).__name__)
        generator = generator_for(self.seed, ordinal)
        return replaced(batch, {leaf.path: self._corrupt(leaf.value, generator) for leaf in tokens})

    def _corrupt(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Negative numbers (the mark of positions to ignore) stay as they are, and are never drawn."""
        low, high = int(value.clamp_min(0).min()), int(value.clamp_min(0).max())
        drawn = torch.randint(low, high + 1, value.shape, generator=generator, dtype=value.dtype)
        hit = torch.rand(value.shape, generator=generator) < self.strength
        return torch.where(hit.to(value.device) & (value >= 0), drawn.to(value.device), value)
