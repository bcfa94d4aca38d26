"""Learning rates: too high, jumping, warmed up too fast, restarted."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.fault import LastingFault, Needs, Scale
from lightning_spike.testing.rate_fault import RateFault


class RateTooHigh(RateFault):
    """A rate that was too high from the beginning.

    A zero too many in the config, a rate for a batch ten times the size.

    The planned rate of every update is multiplied, from the run's first batch on.

    Args:
        at: 0, the first batch: with a later one the rate would jump, which is `RateJump`.
        strength: Factor on the planned rate.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.

    Raises:
        ConfigurationError: `at` is not 0.
    """

    cause = "lr_too_high"
    TYPICAL_ONSET = 0
    TYPICAL_DURATION = 300
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the factor on the planned learning rate", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 20.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0}

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0) -> None:
        super().__init__(at, strength, length, seed)
        if self.at != 0:
            raise ConfigurationError.of(
                "RateTooHigh(at)", expected="0", given=at, do="Use RateJump or RateCreepsUp for a later batch."
            )

    @override
    def factor(self, ordinal: int) -> float:
        return self.strength


class RateCreepsUp(RateFault):
    """A rate that climbs beyond what the loss bears, with no event in it.

    A range test left on, an exponential schedule with a gamma above 1.

    The planned rate is multiplied by a factor that grows geometrically from 1 to `strength` over `ramp` batches and
    stays there (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", the range test).

    Args:
        at: The first batch with a raised rate: batches begun in the whole run before it, from 0.
        strength: The final factor.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
        ramp: Batches until the final factor.
    """

    cause = "lr_too_high"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 240
    SCALE: ClassVar[Scale] = Scale(means="the final factor on the planned learning rate", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 30.0, "ramp": 100}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 300.0, "ramp": 100}

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 100) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("RateCreepsUp(ramp)", ramp, at_least=2, do="Use RateJump for a jump.")
        self._options = {"ramp": self.ramp}

    @override
    def factor(self, ordinal: int) -> float:
        return float(self.strength ** min((ordinal - self.at + 1) / self.ramp, 1.0))


class RateJump(RateFault):
    """A rate that jumps where no schedule should.

    A callback that writes the wrong group, a schedule in steps that was meant in epochs, a bad resume.

    Args:
        at: The first batch with the wrong rate: batches begun in the whole run before it, from 0.
        strength: Factor on the planned rate; below 1 it drops.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
    """

    cause = "lr_scheduler_fault"
    SCALE: ClassVar[Scale] = Scale(means="the factor on the planned learning rate", at_least=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 20.0, "length": None}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0, "length": 6}

    @override
    def factor(self, ordinal: int) -> float:
        return self.strength


class ShortWarmUp(RateFault):
    """A warm-up that ends too soon, at a peak that is stable after a longer one.

    The planned rate is multiplied by `strength * min(k / ramp, sqrt(ramp / k))` in the k-th batch from `at` on: up in a
    line, down with the inverse square root (Vaswani et al. 2017, "Attention Is All You Need", section 5.3).

    Args:
        at: Where the warm-up begins, 0 for the beginning of the run: batches begun in the whole run before it.
        strength: Factor on the planned rate at the peak.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Not used; nothing is drawn.
        ramp: Batches of warm-up; 1 for none.
    """

    cause = "warmup_too_short"
    TYPICAL_ONSET = 0
    TYPICAL_DURATION = 300
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the factor on the planned learning rate at the peak", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 30.0, "ramp": 20}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 100.0, "ramp": 10}

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0, ramp: int = 10) -> None:
        super().__init__(at, strength, length, seed)
        self.ramp = whole_number("ShortWarmUp(ramp)", ramp, at_least=1, do="Use 1 for no warm-up.")
        self._options = {"ramp": self.ramp}

    @override
    def factor(self, ordinal: int) -> float:
        k = ordinal - self.at + 1
        return self.strength * min(k / self.ramp, math.sqrt(self.ramp / k))


class WarmRestarts(LastingFault):
    """Cosine warm restarts whose peak is more than the training bears (Loshchilov and Hutter 2017, "SGDR").

    A real scheduler, `CosineAnnealingWarmRestarts`, takes the place of the module's own for the whole run. The run
    begins in the tail of its first cycle, where the rate is the module's own, which then decays to a fiftieth; at the
    batch `at` the rate comes back up, to `strength` times the module's own. Where the module has a schedule its own
    rate is that which it was set up with, before the schedule's factor: the first steps of a warm-up are not what it
    trains at.

    Args:
        at: The first batch after the restart: batches begun in the whole run before it, at least 2; a multiple of
            `accumulate_grad_batches`.
        strength: Peak of the restart, as a factor on the module's own rate.
        seed: Not used; nothing is drawn.
    """

    cause = "lr_restart"
    FROM_START = True
    SCALE: ClassVar[Scale] = Scale(means="the peak, as a factor on the module's own rate", above=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 15.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 60.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.AUTOMATIC_OPTIMIZATION})

    def __init__(self, at: int, strength: float, seed: int = 0) -> None:
        super().__init__(at, strength, None, seed)
        whole_number("WarmRestarts(at)", at, at_least=2, do="There must be some batches before the restart.")

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self.require(module.automatic_optimization, Needs.AUTOMATIC_OPTIMIZATION, type(module).__name__)
        own = list(trainer.strategy.lr_scheduler_configs)
        rates = [
            [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        steps = self.at // trainer.accumulate_grad_batches
        trainer.strategy.lr_scheduler_configs = [
            LRSchedulerConfig(scheduler=self._scheduler(optimizer, steps), interval="step")
            for optimizer in trainer.optimizers
        ]

        def undo() -> None:
            trainer.strategy.lr_scheduler_configs = own
            for optimizer, of_groups in zip(trainer.optimizers, rates, strict=False):
                for group, (rate, initial) in zip(optimizer.param_groups, of_groups, strict=False):
                    group["lr"] = rate
                    if initial is None:
                        group.pop("initial_lr", None)
                    else:
                        group["initial_lr"] = initial

        self.later(undo)

    def _scheduler(self, optimizer: Optimizer, steps: int) -> CosineAnnealingWarmRestarts:
        """Cosine from strength down to 1/50.

        The share of the cycle that is over where the cosine stands at 1 is skipped.
        """
        low = 1 / 50
        skipped = math.acos(2 * (1 - low) / (self.strength - low) - 1) / math.pi
        period = max(round(steps / (1 - skipped)), steps + 1)
        own = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = group["initial_lr"] = rate * self.strength
        scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=period, eta_min=min(own) * low)
        scheduler.step(period - steps)
        return scheduler
