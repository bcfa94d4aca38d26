"""One-sided samples in a row: a sorted or unshuffled stretch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.errors import ConfigurationError
from lightning_spike.signals.batch import BatchLeaf, BatchPart, batch_leaves
from lightning_spike.testing.batch_edit import leaves_of, number_of_samples, replaced
from lightning_spike.testing.fault import Fault, Scale

KEYS_TRIED: Final = (BatchPart.TARGET, BatchPart.INPUT)
"""Parts whose mean samples are sorted by: the target, else the input."""


class SortedStretch(Fault):
    """A stretch that came sorted.

    A shard written class by class, a shuffle buffer too small, an epoch without shuffling.

    The samples of the batches before `at` come a second time, sorted by their target (its mean over the sample, for
    sequences and masks; the input's where there is no target). Every sample is a healthy one, and so is the make-up of
    the stretch as a whole; only the order is not.

    Args:
        at: The first batch of the stretch: batches begun in the whole run before it, from 0; at least `length`.
        strength: Share of each batch that comes from the stretch; the rest are the batch's own samples.
        length: Batches in the stretch.
        seed: Not used; nothing is drawn.

    Raises:
        ConfigurationError: `at` is less than `length`, `length` is None, or, when the stretch begins, samples of
            different batches differ in shape.
    """

    cause = "hard_sample_streak"
    SCALE: ClassVar[Scale] = Scale(
        means="the share of each batch that comes from the sorted stretch", above=0, at_most=1
    )
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 12}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 40}

    def __init__(self, at: int, strength: float, length: int | None = 12, seed: int = 0) -> None:
        super().__init__(at, strength, length, seed)
        if length is None or length > self.at:
            raise ConfigurationError.of(
                "SortedStretch(length)",
                expected=f"at most at ({self.at}): the samples before it come again",
                given=length,
                do="Let it begin later, or make it shorter.",
            )
        self._before: list[Any] = []
        self._stretch: list[dict[tuple[str | int, ...], Tensor]] = []

    @override
    def lasts(self, ordinal: int) -> bool:
        """The batches before are looked at too; they are let through."""
        return self.length is not None and self.at - self.length <= ordinal < self.at + self.length

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        if ordinal < self.at:
            self._before.append(batch)
            return batch
        if self._before:
            self._stretch = self._sorted()
            self._before = []
        if not self._stretch:
            return batch
        samples = self._stretch.pop(0)
        leaves = {leaf.path: leaf for leaf in _sample_leaves(batch)}
        return replaced(
            batch, {path: self._mixed(leaves[path].value, new) for path, new in samples.items() if path in leaves}
        )

    def _sorted(self) -> list[dict[tuple[str | int, ...], Tensor]]:
        """The samples of the batches before, in the order of their keys, cut into batches."""
        paths = [leaf.path for leaf in _sample_leaves(self._before[0])]
        columns = []
        for path in paths:
            values = [leaf.value for batch in self._before for leaf in _sample_leaves(batch) if leaf.path == path]
            shapes = sorted({tuple(value.shape[1:]) for value in values})
            self.require(len(shapes) == 1, "samples of one shape", shapes)
            columns.append(torch.cat(values))
        size = number_of_samples(self._before[0])
        order = torch.cat([_keys(batch) for batch in self._before]).argsort(stable=True)
        pieces = [torch.split(column.index_select(0, order), size) for column in columns]
        return [dict(zip(paths, cut, strict=True)) for cut in zip(*pieces, strict=True)]

    def _mixed(self, own: Tensor, sorted_ones: Tensor) -> Tensor:
        count = min(max(1, round(self.strength * len(own))), len(sorted_ones), len(own))
        return torch.cat([sorted_ones[:count], own[count:]])


def _sample_leaves(batch: object) -> list[BatchLeaf]:
    samples = number_of_samples(batch)
    return [leaf for leaf in batch_leaves(batch) if leaf.value.dim() > 0 and leaf.value.shape[0] == samples]


def _keys(batch: object) -> Tensor:
    samples = number_of_samples(batch)
    for part in KEYS_TRIED:
        for leaf in leaves_of(batch, part):
            if leaf.value.dim() and leaf.value.shape[0] == samples:
                return leaf.value.detach().double().reshape(samples, -1).mean(1)
    return torch.zeros(samples)
