"""Gradients that explode or vanish through depth."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.testing.fault import Scale
from lightning_spike.testing.layers import LayerFault, Layers


class _Gain(torch.autograd.Function):
    """The identity; gradients that flow back through it are multiplied by a factor."""

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _GradientFault(LayerFault):
    @override
    def parts(self, layers: Layers) -> Sequence[nn.Module]:
        return layers.all()

    @override
    def changed(self, output: Tensor) -> Tensor:
        gained: Tensor = _Gain.apply(output, self.strength)  # type: ignore[no-untyped-call]
        return gained


class GradientsExplode(_GradientFault):
    """Gradients grow through depth for some batches.

    Every layer hands back more than it got, as recurrent or residual paths with a gain above 1.

    The forward pass is as it was, to the bit. A layer with k layers behind it gets its gradient times strength to the
    power of k + 1 (Pascanu et al. 2013, "On the difficulty of training recurrent neural networks").

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: Factor on the gradients for each layer.
        length: Such batches in a row; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "gradient_explosion"
    SCALE: ClassVar[Scale] = Scale(means="the factor on the gradients for each layer", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 8.0, "length": 2}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 30.0, "length": 4}


class GradientsVanish(_GradientFault):
    """Gradients die out through depth: every layer hands back less than it got.

    The forward pass is as it was, to the bit. A layer with k layers behind it gets its gradient times strength to the
    power of k + 1.

    Args:
        at: The first such batch: batches begun in the whole run before it; 0 for a training that never gets going.
        strength: Factor on the gradients for each layer.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "gradient_vanishing"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the factor on the gradients for each layer", above=0, at_most=0.999)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.05}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1e-4}


class SigmoidStack(LayerFault):
    """Too many sigmoids one after the other, without normalisation or residuals.

    Signal and gradient shrink to a quarter at each at most.

    So many sigmoids are put behind every hidden layer (Glorot and Bengio 2010, "Understanding the difficulty of
    training deep feedforward neural networks").

    Args:
        at: The first batch with them: batches begun in the whole run before it; 0 for a training that never gets going.
        strength: How many; a fraction is left out.
        length: Batches that they stay; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "gradient_vanishing"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the number of sigmoids behind every hidden layer", at_least=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 3}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 8}

    @override
    def parts(self, layers: Layers) -> Sequence[nn.Module]:
        return layers.hidden()

    @override
    def changed(self, output: Tensor) -> Tensor:
        for _ in range(int(self.strength)):
            output = output.sigmoid()
        return output
