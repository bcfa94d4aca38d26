"""Faults that only an optimizer with a second moment can have."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.testing.alter import alter_gradients
from lightning_spike.testing.batch_edit import generator_for, some_of
from lightning_spike.testing.fault import LastingFault, Needs, Scale, optimizer_classes, param_groups
from lightning_spike.testing.settings import SettingsFault

GRADIENT_FACTOR: Final = 1e-12
"""Factor on gradients that makes them far smaller than Adam's usual epsilon of 1e-8."""

NEGLIGIBLE_EPSILON: Final = 1e-30
"""An epsilon without effect in float32 beside gradients of that size."""


def _need_adam(fault: LastingFault, trainer: Trainer) -> None:
    found = any("betas" in group and "eps" in group for group in param_groups(trainer))
    fault.require(found, Needs.ADAM, optimizer_classes(trainer))


class GradientsOutgrowSecondMoment(LastingFault):
    """Gradients grow from batch to batch, faster than Adam's second moment follows.

    Rare tokens come in, a part of the loss wakes up.

    The gradients are multiplied by a factor that grows to the power of the batches since `at`, for `ramp` batches, and
    then stays. As long as they grow, v_t is out of date and updates are too large, by up to `(1 - beta1) / (1 - beta1 /
    s) / sqrt((1 - beta2) / (1 - beta2 / s**2))`, some 7 times with the usual betas late in a run and `sqrt(1 -
    beta2**t)` of that after t updates, because of the correction for the start: after 150 that is 2.5. So it bites late
    in a run, or where the learning rate leaves little room. See Wortsman et al. 2023, "Stable and low-precision
    training for large-scale vision-language models", section 3. With SGD it would be an explosion.

    Args:
        at: The batch before the first with larger gradients: batches begun in the whole run before it, from 0.
        strength: The s above, the growth of the gradients in each batch.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
        ramp: Batches in which they grow.
    """

    cause = "stale_second_moment"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 160
    SCALE: ClassVar[Scale] = Scale(means="the factor by which gradients grow in each batch", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.1, "ramp": 60}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.25, "ramp": 80}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.ADAM})

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 60) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("GradientsOutgrowSecondMoment(ramp)", ramp, at_least=1, do="Use 1 for a jump.")
        self._options = {"ramp": self.ramp}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        _need_adam(self, trainer)
        self._steps: list[int] = []
        self._factors: list[float] = []

        def grown(gradient: Tensor, _: int) -> Tensor:
            """Looks the factor up by step, so a replay finds the same; several optimizers have several per batch."""
            return gradient * self._factors[bisect_right(self._steps, trainer.global_step) - 1]

        alter_gradients(self, trainer, module, grown)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        self._steps.append(trainer.global_step)
        self._factors.append(self.strength ** min(ordinal - self.at + 1, self.ramp))
        return batch


class EpsilonUnderflow(SettingsFault):
    """Adam's epsilon is 0, as 1e-8 is in half precision; a weight that never had a gradient then gets 0 / 0.

    Some weights of every parameter never get a gradient, as those of a unit that is never active; with any epsilon
    their update is 0. At the batch `at` the epsilon of every group becomes 0, and their update is NaN.

    Args:
        at: The first batch without an epsilon: batches begun in the whole run before it, from 0.
        strength: Share of the weights of each parameter that never get a gradient, at least one.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of weights.
    """

    cause = "adam_epsilon_too_small"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the share of the weights without a gradient", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1e-9}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.1}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.ADAM})

    @override
    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"eps": 0.0} if "eps" in group else {}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super().prepare(trainer, module)
        _need_adam(self, trainer)
        alter_gradients(self, trainer, module, self._masked, always=True)

    def _masked(self, gradient: Tensor, number: int) -> Tensor:
        where = some_of(gradient.numel(), self.strength, generator_for(self.seed, number), gradient.device)
        return gradient.flatten().index_fill(0, where, 0.0).reshape(gradient.shape)


class NoiseAtFullSize(SettingsFault):
    """Gradients far below the usual epsilon and an epsilon far below them.

    Adam turns their rounding noise into updates of full size.

    From the batch `at` on the epsilon of every group is 1e-30, and the gradients are `1e-12 * (g + strength * rms(g) *
    noise)`. Since v_t forgets slowly, it only bites where it begins with the run.

    Args:
        at: The first batch with it: batches begun in the whole run before it; 0 for the beginning of the run.
        strength: Noise over signal in the gradients.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the noise.
    """

    cause = "adam_epsilon_too_small"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the noise over the signal in the gradients", at_least=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 10.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.ADAM})

    @override
    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"eps": NEGLIGIBLE_EPSILON} if "eps" in group else {}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super().prepare(trainer, module)
        _need_adam(self, trainer)

        def drowned(gradient: Tensor, number: int) -> Tensor:
            generator = generator_for(self.seed + number, trainer.global_step)
            noise = torch.randn(gradient.shape, generator=generator).to(gradient)
            return GRADIENT_FACTOR * (gradient + self.strength * gradient.square().mean().sqrt() * noise)

        alter_gradients(self, trainer, module, drowned)
