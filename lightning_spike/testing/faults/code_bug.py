"""Bugs in the training logic."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.testing.batch_edit import generator_for, some_of
from lightning_spike.testing.fault import LastingFault, Needs, OneOffFault, Scale
from lightning_spike.testing.wrapping import wrap

CPU = torch.device("cpu")


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
        if not module.automatic_optimization:
            raise self.refuse(Needs.AUTOMATIC_OPTIMIZATION, type(module).__name__)

        def zero(call: Callable[..., Any], epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
            kept = self._chosen(optimizer) if self.is_on(trainer) else []
            gradients = [(p, p.grad.clone()) for p in kept if p.grad is not None]
            call(epoch, batch_idx, optimizer)
            for parameter, gradient in gradients:
                parameter.grad = gradient

        self.later(wrap(module, "optimizer_zero_grad", zero))

    def _chosen(self, optimizer: Optimizer) -> list[nn.Parameter]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = some_of(len(parameters), self.strength, generator_for(self.seed, 0), CPU)
        return [parameters[k] for k in chosen.tolist()]


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
        self.later(self._train_again)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        if not self._were_training:
            parts = list(module.modules())
            chosen = some_of(len(parts), self.strength, generator_for(self.seed, 0), CPU)
            self._were_training = [parts[k] for k in chosen.tolist() if parts[k].training]
            for part in self._were_training:
                part.training = False
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.lasts(self._begun):
            self._train_again()

    def _train_again(self) -> None:
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
        self.later(self._put_in_again)
        if self.at == 0:  # as in real life: nobody ever saw them in the optimizer
            self._take_out(trainer)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        self._take_out(trainer)
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.lasts(self._begun):
            self._put_in_again()

    def _take_out(self, trainer: Trainer) -> None:
        if self._full:
            return
        self._full = [(group, group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        parameters = [p for _, of_group in self._full for p in of_group]
        chosen = some_of(len(parameters), self.strength, generator_for(self.seed, 0), CPU).tolist()
        left_out = {id(parameters[k]) for k in chosen}
        for group, of_group in self._full:
            group["params"] = [p for p in of_group if id(p) not in left_out]

    def _put_in_again(self) -> None:
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
    @torch.no_grad()
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        generator = generator_for(self.seed, ordinal)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * parameter.square().mean().sqrt() * self.strength)
        return batch
