"""Trainings that memorize too few samples."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.signals.batch import BatchLeaf, BatchPart
from lightning_spike.testing.batch_edit import edit_batch, generator_for
from lightning_spike.testing.fault import LastingFault, Scale

PERIOD: Final = 10
"""Batches of one swing, half of them perturbed."""


class _Pool:
    """Repeats the first batches from `at` on."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[Any] = []

    def next(self, batch: Any, number: int) -> Any:
        """The batch itself while the pool fills, then a copy of each in turn: `training_step` may write to it."""
        if len(self._kept) < self._size:
            self._kept.append(_copy(batch))
            return batch
        return _copy(self._kept[number % self._size])


class FewBatches(LastingFault):
    """The training set is far too small, or the loader is stuck on a few shards.

    The same few batches come again and again.

    Training loss falls, validation loss rises. The batches that come at `at` and after it are kept and repeated; the
    loader's own go unused.

    Args:
        at: The first batch that is kept: batches begun in the whole run before it, from 0.
        strength: How many batches are left to train on, a whole number: the fewer, the stronger.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "overfitting"
    TYPICAL_ONSET = 60
    TYPICAL_DURATION = 420
    SCALE: ClassVar[Scale] = Scale(means="the number of batches that are left; fewer is stronger", at_least=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 2}

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0) -> None:
        super().__init__(at, strength, length, seed)
        if not self.strength.is_integer():
            raise ConfigurationError.of(
                "FewBatches(strength)", expected="a whole number", given=strength, do="It is a number of batches."
            )

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._pool = _Pool(int(self.strength))

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        return self._pool.next(batch, ordinal - self.at)


class SwingsAfterOverfitting(LastingFault):
    """Training goes on long after it has overfitted, and small changes of the data hit harder and harder.

    No early stopping, augmentation turned on late.

    The same few batches come again and again. Once they are known by heart, in every second five of them the input is
    perturbed, a little more each time: floating-point inputs by noise, tokens by others of the batch.

    Args:
        at: The first batch that is kept: batches begun in the whole run before it, from 0.
        strength: How fast the perturbation grows: standard deviations of the input (for tokens: quarters of all) in 100
            batches.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the perturbation.
        batches: How many batches are left to train on.
        settle: Batches from `at` to the first perturbation.
    """

    cause = "post_overfit_oscillation"
    TYPICAL_ONSET = 60
    TYPICAL_DURATION = 420
    SCALE: ClassVar[Scale] = Scale(means="the growth of the perturbation in 100 batches", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 4.0}

    def __init__(
        self,
        at: int,
        strength: float,
        length: int | None = None,
        seed: int = 0,
        batches: int = 2,
        settle: int = 100,
    ) -> None:
        super().__init__(at, strength, length, seed)
        name = "SwingsAfterOverfitting"
        self.batches = whole_number(f"{name}(batches)", batches, at_least=1, do="Use 1 for a single batch.")
        self.settle = whole_number(f"{name}(settle)", settle, at_least=0, do="Use 0 for swings from the beginning.")
        self._options = {"batches": batches, "settle": settle}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._pool = _Pool(self.batches)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        number = ordinal - self.at
        batch = self._pool.next(batch, number)
        past = number - self.settle
        if past < 0 or past % PERIOD < PERIOD // 2:
            return batch
        generator = generator_for(self.seed, ordinal)
        return edit_batch(batch, lambda leaf: _perturbed(leaf, self.strength * past / 100, generator))


def _perturbed(leaf: BatchLeaf, amount: float, generator: torch.Generator) -> Tensor:
    value = leaf.value
    if leaf.part is not BatchPart.INPUT or value.numel() == 0 or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + amount * value.std(correction=0) * noise
    others = value.flatten()[torch.randperm(value.numel(), generator=generator).to(value.device)].reshape(value.shape)
    hit = torch.rand(value.shape, generator=generator) < amount / 4
    return torch.where(hit.to(value.device), others, value)


def _copy(batch: object) -> object:
    return edit_batch(batch, lambda leaf: leaf.value.clone())
