"""Harmless oddities, as in any training, for which no cause should be diagnosed."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import leaves_of, replaced
from lightning_spike.testing.fault import Fault, Needs, Scale
from lightning_spike.testing.faults.bad_batch import CorruptTokens, ExtremeValues
from lightning_spike.testing.rate_fault import RateFault


class HarmlessScale(Fault):
    """A batch that is somewhat brighter: the values of its input times a factor near 1.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: The factor.
        length: Such batches in a row.
        seed: Not used; nothing is drawn.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the factor on the input, near 1", at_least=0.5, at_most=2)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.2}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.5}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.FLOAT_INPUT})

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        inputs = leaves_of(batch, BatchPart.INPUT, floating=True)
        leaves = self.require(inputs, Needs.FLOAT_INPUT, type(batch).__name__)
        return replaced(batch, {leaf.path: leaf.value * self.strength for leaf in leaves})


class HarmlessNoise(ExtremeValues):
    """A batch that is a little harder: noise of a fraction of a standard deviation on its input.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Standard deviation of the noise, in those of the input.
        length: Such batches in a row.
        seed: Of the noise and of the choice of samples.
        share: Of the samples of a batch, at least one; 1 is all.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the noise, in standard deviations of the input", above=0, at_most=0.5)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.1}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.3}


class HarmlessTokens(CorruptTokens):
    """A batch with a few typing errors.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Share of the tokens replaced.
        length: Such batches in a row.
        seed: Of the choice and of the new tokens.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the share of the tokens that are replaced", above=0, at_most=0.1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.01}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.03}


class HarmlessRate(RateFault):
    """A single update with a learning rate that is somewhat too large.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Factor on the planned rate.
        length: Such batches in a row.
        seed: Not used; nothing is drawn.
    """

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the factor on the planned learning rate, near 1", at_least=0.5, at_most=2)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.2}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.5}

    def __init__(self, at: int, strength: float, length: int | None = 1, seed: int = 0) -> None:
        super().__init__(at, strength, length, seed)

    @override
    def factor(self, ordinal: int) -> float:
        return self.strength
