"""Units that are dead or saturated."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault, Needs, Scale
from lightning_spike.testing.layers import on_output

ONE_SIDED: Final = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus)
TWO_SIDED: Final = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign)
TRANSFORMER: Final = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

RECURRENT_GAIN: Final = 10.0
"""Factor on the shift of a recurrent layer's input, which passes its weights before the gates."""


class UnitsSaturate(LastingFault):
    """Activations are driven into their flat parts.

    A bias that ran away, inputs in other units, a normalisation that was taken out.

    Before every activation module, before the activation inside torch's Transformer layers, and before every recurrent
    layer, the values are pushed: for ReLU and its kin down, by so many standard deviations; for sigmoid, tanh and
    recurrent layers away from 0.

    Args:
        at: The first such batch: batches begun in the whole run before it, from 0.
        strength: How far, in standard deviations of the values.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "activation_saturation"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 200
    SCALE: ClassVar[Scale] = Scale(means="how far the values are pushed, in standard deviations", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 2.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.ACTIVATIONS})

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        undos = [undo for part in module.modules() for undo in self._install(trainer, part)]
        for undo in self.require(undos, Needs.ACTIVATIONS, type(module).__name__):
            self.later(undo)

    def _install(self, trainer: Trainer, part: nn.Module) -> list[Callable[[], None]]:
        if isinstance(part, ONE_SIDED):
            return [_on_input(part, lambda value: self._down(trainer, value))]
        if isinstance(part, TWO_SIDED):
            return [_on_input(part, lambda value: self._outward(trainer, value, 1.0))]
        if isinstance(part, nn.RNNBase):
            return [_on_input(part, lambda value: self._outward(trainer, value, RECURRENT_GAIN))]
        if isinstance(part, TRANSFORMER) and not isinstance(part.activation, nn.Module):
            return [on_output(part.linear1, lambda value: self._down(trainer, value))]
        return []

    def _down(self, trainer: Trainer, value: Tensor) -> Tensor:
        if not self.is_on(trainer):
            return value
        return value - self.strength * value.detach().std(correction=0)

    def _outward(self, trainer: Trainer, value: Tensor, gain: float) -> Tensor:
        if not self.is_on(trainer):
            return value
        return value + gain * self.strength * value.detach().std(correction=0) * value.detach().sign()


def _on_input(part: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def hook(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        del part
        return (change(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) else None

    return part.register_forward_pre_hook(hook).remove
