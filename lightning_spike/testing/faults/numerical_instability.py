"""A non-finite or huge value that is born inside the model."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.testing.fault import Scale
from lightning_spike.testing.layers import LayerFault, Layers


class _AtTheHead(LayerFault):
    """Base of the faults after the last layer, usually the head."""

    @override
    def parts(self, layers: Layers) -> Sequence[nn.Module]:
        last = layers.last()
        return [last] if last is not None else []


class ExpOverflow(_AtTheHead):
    """`log(exp(x))` without subtracting the largest value first.

    Exp overflows above 88 in float32, and log meets 0 below -103.

    Behind the last layer stands `log(exp(strength * x)) / strength`, which is x on paper.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: Factor in the exponent; it overflows at outputs above 88 / strength.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "numerical_instability"
    SCALE: ClassVar[Scale] = Scale(means="the factor in the exponent", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 15.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 60.0}

    @override
    def changed(self, output: Tensor) -> Tensor:
        return (output * self.strength).exp().log() / self.strength


class LogOfZero(_AtTheHead):
    """`log(softmax(x))` in two steps: a probability underflows to 0, and its logarithm is minus infinity.

    Behind the last layer stands `log(softmax(strength * x)) / strength`, which for a cross-entropy is x on paper.

    Args:
        at: The first batch with it: batches begun in the whole run before it, from 0.
        strength: Factor in the softmax; it underflows where two outputs are more than 103 / strength apart.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "numerical_instability"
    SCALE: ClassVar[Scale] = Scale(means="the factor in the softmax", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 60.0}

    @override
    def changed(self, output: Tensor) -> Tensor:
        return (output * self.strength).softmax(-1).log() / self.strength


class DivisionByZero(_AtTheHead):
    """A normalisation by a spread that is nearly or exactly 0, without an epsilon.

    A constant column, a batch of equal samples.

    What the last layer gives is divided by `1 - strength`.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Share of the spread that is gone: 1 divides by exactly 0, less gives huge values.
        length: Such batches in a row; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "numerical_instability"
    SCALE: ClassVar[Scale] = Scale(means="the share of the spread that is gone", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.999, "length": 3}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 1}

    @override
    def changed(self, output: Tensor) -> Tensor:
        spread = output.detach().std(correction=0)
        return output * spread / (spread * (1 - self.strength))


class SqrtAtZero(_AtTheHead):
    """A norm at 0: its value is fine and its gradient is 0 times infinity.

    The distance of a point to itself, a vector of zeros that is normalised.

    To the output of a share of the samples the norm of a vector of zeros is added: the loss is as it was, the gradients
    are NaN.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Share of the samples, at least one, the first ones.
        length: Such batches in a row; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "numerical_instability"
    SCALE: ClassVar[Scale] = Scale(means="the share of the samples", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1e-9, "length": 1}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 1}

    @override
    def changed(self, output: Tensor) -> Tensor:
        count = max(1, round(self.strength * len(output)))
        own = (output[:count] - output[:count].detach()).square().sum(-1, keepdim=True).sqrt()
        padding = (0, 0) * (output.dim() - 1) + (0, len(output) - count)
        return output + nn.functional.pad(own, padding)
