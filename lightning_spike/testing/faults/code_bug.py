"""Bugs in the training logic."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.batch_edit import add_noise, generator_for, some_items
from lightning_spike.testing.fault import LastingFault, Needs, OneOffFault, Scale, param_groups
from lightning_spike.testing.wrapping import wrap


class GradientsNotZeroed(LastingFault):
    """`zero_grad` is not called, or not for all parameters.

    An override of `optimizer_zero_grad` that returns early, a gradient kept in a buffer.

    The gradients of the batches pile up: an update is made with their sum. A validation in between still clears them,
    as Lightning does.

    Args:
        at: The first batch whose gradients are added to those of the last: batches begun in the whole run before it,
            from 0.
        strength: Share of the parameters whose gradients are not zeroed, at least one.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of parameters.
    """

    cause = "code_bug"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 200
    SCALE: ClassVar[Scale] = Scale(
        means="the share of the parameters whose gradients are not zeroed", above=0, at_most=1
    )
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": 20}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "length": None}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.AUTOMATIC_OPTIMIZATION})

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self.require(module.automatic_optimization, Needs.AUTOMATIC_OPTIMIZATION, type(module).__name__)

        def zero(call: Callable[..., Any], epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            kept = some_items(parameters, self.strength, self.seed) if self.is_on(trainer) else []
            gradients = [(p, p.grad.clone()) for p in kept if p.grad is not None]
            call(epoch, batch_idx, optimizer)
            for parameter, gradient in gradients:
                parameter.grad = gradient

        self.later(wrap(module, "optimizer_zero_grad", zero))


class EvalModeLeftOn(LastingFault):
    """`module.eval()` in user code, and no `train()` after it.

    Dropout is off and batch norm uses its running statistics.

    Args:
        at: The first batch in the wrong mode: batches begun in the whole run before it, from 0.
        strength: Share of the submodules left in eval mode, at least one; 1 is the whole module.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of submodules.
    """

    cause = "code_bug"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 200
    SCALE: ClassVar[Scale] = Scale(means="the share of the submodules left in eval mode", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._were_training: list[nn.Module] = []
        self.later(self.end)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        chosen = some_items(list(module.modules()), self.strength, self.seed)
        self._were_training = [part for part in chosen if part.training]
        for part in self._were_training:
            part.training = False

    @override
    def end(self) -> None:
        for part in self._were_training:
            part.training = True
        self._were_training = []


class ParametersNotOptimized(LastingFault):
    """Parameters that no optimizer has.

    A layer made after `configure_optimizers`, a filter on names that matches too little.

    Args:
        at: The first batch whose update leaves them out: batches begun in the whole run before it, 0 for the whole run.
        strength: Share of the parameters that are left out, at least one.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the choice of parameters.
    """

    cause = "code_bug"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 200
    SCALE: ClassVar[Scale] = Scale(means="the share of the parameters that no optimizer has", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.3}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 0.9}

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._full: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self.later(self.end)
        if self.at == 0:  # never in the optimizer, as with the real bug
            self.begin(trainer, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._full:
            return
        self._full = [(group, group["params"]) for group in param_groups(trainer)]
        parameters = [p for _, of_group in self._full for p in of_group]
        left_out = {id(p) for p in some_items(parameters, self.strength, self.seed)}
        for group, of_group in self._full:
            group["params"] = [p for p in of_group if id(p) not in left_out]

    @override
    def end(self) -> None:
        for group, parameters in self._full:
            group["params"] = parameters
        self._full = []


class WeightsOverwritten(OneOffFault):
    """User code writes into the weights between two steps.

    An averaging that mixes in the wrong model, a perturbation that is not taken back.

    To every parameter noise is added, in proportion to the root mean square of its values.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: Noise over the root mean square of each parameter.
        seed: Of the noise.
    """

    cause = "code_bug"
    TYPICAL_ONSET = 160
    TYPICAL_DURATION = 200
    SCALE: ClassVar[Scale] = Scale(means="the noise over the root mean square of each parameter", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 3.0}

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        add_noise(module, self.strength, generator_for(self.seed, ordinal))
        return batch
