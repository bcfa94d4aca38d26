"""Wrong labels in one or several batches."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import generator_for, leaves_of, replaced, some_of
from lightning_spike.testing.fault import Fault, Needs, Scale


class WrongLabels(Fault):
    """Labels that belong to other samples.

    A join gone wrong, a shard whose label file is shifted, an annotator who mixed up two classes.

    Of a share of the samples, whole-number targets become another of the values that occur in the batch, never their
    own (all the positions of a sample, where it has several); floating-point targets are taken from the next sample of
    those chosen. The inputs stay.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Share of the samples with a wrong target, at least one.
        length: Such batches in a row.
        seed: Of the choice and the wrong values.
    """

    cause = "label_noise"
    SCALE: ClassVar[Scale] = Scale(means="the share of the samples whose target is wrong", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5, "length": 2}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 8}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.TARGET})

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        leaves = [leaf for leaf in leaves_of(batch, BatchPart.TARGET) if leaf.value.dim() > 0]
        self.require(leaves, Needs.TARGET, type(batch).__name__)
        generator = generator_for(self.seed, ordinal)
        return replaced(batch, {leaf.path: self._wrong(leaf.value, generator) for leaf in leaves})

    def _wrong(self, value: Tensor, generator: torch.Generator) -> Tensor:
        chosen = some_of(value.shape[0], self.strength, generator, value.device)
        if value.is_floating_point():
            return value.index_copy(0, chosen, value.index_select(0, chosen.roll(1)))
        return value.index_copy(0, chosen, _other(value, value.index_select(0, chosen), generator))


def _other(all_values: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
    """For each value another one that occurs; negative ones (positions to ignore) stay."""
    kinds = torch.unique(all_values[all_values >= 0])
    if len(kinds) < 2:  # noqa: PLR2004 - there is no other
        return values
    place = torch.searchsorted(kinds, values.clamp_min(int(kinds[0])))
    shift = torch.randint(1, len(kinds), values.shape, generator=generator).to(values.device)
    return torch.where(values >= 0, kinds[(place + shift) % len(kinds)], values)
