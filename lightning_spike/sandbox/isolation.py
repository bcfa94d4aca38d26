"""Run `training_step` again and restore all state afterwards, to the bit."""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_lightning_module_hook
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_spike.errors import CannotReplay
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks
from lightning_spike.record.mixed_precision import scaler_of
from lightning_spike.records import Moment
from lightning_spike.sandbox.budget import COPY_COST, Allowance, step_cost
from lightning_spike.sandbox.object_snapshot import ObjectSnapshot
from lightning_spike.sandbox.trainer_context import (
    Places,
    TrainerContext,
    on_one_rank,
    open_window,
    patched,
    set_position,
    without_schedulers,
    without_updates,
)
from lightning_spike.signals.loss import batch_losses
from lightning_spike.signals.random_state import RandomState

SHARDED_STRATEGIES: Final = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Strategies whose module holds only parts of the weights outside of their own wrapper."""

MUTED_METHODS: Final = ("log", "log_dict", "print")
"""Output methods of a `LightningModule` in `training_step`."""


class Sandbox:
    """Runs steps inside `isolated`, which makes it, and restores the state in between."""

    def __init__(self, trainer: Trainer, module: LightningModule, *, with_optimizers: bool, ranks: Ranks) -> None:
        self.trainer = trainer
        self.module = module
        self.ranks = ranks
        """The ranks that run the same steps."""
        self._takes_index = bool(
            is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        )  # Lightning's own rule
        self._random = RandomState.take()
        # Only a stepping optimizer changes its state.
        leave = list(trainer.optimizers) if with_optimizers else [o.state for o in trainer.optimizers]
        self._state = ObjectSnapshot(_roots(trainer, module, with_optimizers), leave=leave)
        # Twice the size of the weights and written only by updates, so most rewinds need no copy.
        optimizers = [(f"optimizers[{k}]", vars(o)) for k, o in enumerate(trainer.optimizers) if with_optimizers]
        self._optimizers = ObjectSnapshot(optimizers, leave=module.parameters())
        self._has_trained = False
        self._context = TrainerContext(trainer)
        self._batches: dict[int, tuple[object, ObjectSnapshot]] = {}
        self.cache: dict[tuple[int, ...], tuple[Any, object]] = {}
        """Results by the ids of the objects they depend on, with these objects, so that no id is reused."""
        self.allowance = Allowance()
        """Limit on the cost; none at first."""
        self.updates = 0
        """Number of training steps with their backward pass."""
        self.modes: Mapping[int, tuple[str, ...]] = {}
        """Names of the modules in eval mode, by the batch ordinal of each change; empty for the present modes."""
        self.steps = 0
        """Number of runs of `training_step` …"""
        self.graphs = 0
        """… and those of them outside of training that record a graph."""

    def step(
        self,
        batch: object,
        batch_idx: int,
        *,
        random: RandomState | None = None,
        at: Moment | None = None,
        in_float32: bool = False,
        graph: bool = True,
    ) -> Any:
        """Run `training_step` once without an update.

        Uses the run's precision, no `torch.compile`, and this rank alone (`on_one_rank`). Buffers, counters and random
        states change as in training, until `rewind`. Changes of the batch stay until its next step, `rewind` or the
        end, as a backward pass can need them.

        Under manual optimisation, `manual_backward` records the loss, `step` runs only its closure, and `zero_grad`,
        toggling, clipping and schedulers do nothing. A bare `loss.backward()` still runs.

        Args:
            batch: The batch, on the module's device.
            batch_idx: For `training_step` if it takes it.
            random: Initial state of the random generators; the present one by default.
            at: Position in the run for `global_step` and `current_epoch`; the present one by default.
            in_float32: Without autocast, in the precision of the weights.
            graph: Record the graph for a backward pass.

        Returns:
            The output of `training_step`. Under manual optimisation without a returned loss, a dict with the `"loss"`
            of the backward pass, or with the sum and each of several (`"loss/backward0"`).

        Raises:
            CannotReplay: The batch holds something that cannot be put back.
        """
        self._begin_step(batch, random, at)
        self.graphs += graph
        arguments = (batch, batch_idx) if self._takes_index else (batch,)
        with (
            torch.set_grad_enabled(graph),
            eagerly(),
            on_one_rank(self.trainer, self.module),
            self._precision(in_float32),
            without_updates(self.module) as losses,
        ):
            outputs = self.module.training_step(*arguments)
        return _with_loss(outputs, losses)

    def train(
        self,
        batch: object,
        batch_idx: int,
        *,
        random: RandomState,
        at: Moment,
        closes: bool,
        listener: Callback,
        in_float32: bool = False,
    ) -> Any:
        """Train on one batch as the run did: Lightning's loop, strategy, compiled code, optimizers and one callback.

        Runs the module's hooks from `on_train_batch_start` to `on_train_batch_end`, but no schedulers. Under DDP, all
        ranks must call it, and begin together.

        Args:
            batch: As in `step`, like the next ones.
            batch_idx: Also gives the position in an accumulation window.
            random: State before the batch.
            at: Position in the run.
            closes: Whether the optimizer steps after this batch; ignored under manual optimisation.
            listener: The callback.
            in_float32: Without autocast.

        Returns:
            The outputs for `on_train_batch_end`: under automatic optimisation the detached loss, divided by the
            accumulation.

        Raises:
            CannotReplay: The batch holds something that cannot be put back.
            Exception: From the listener or the module; call `rewind` then.
        """
        self.ranks.barrier("a training step", at.ordinal)
        self._begin_step(batch, random, at)
        self._has_trained = True
        self.updates += 1
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            open_window(self.trainer)
        loops, module = self.trainer.fit_loop.epoch_loop, self.module
        arguments = OrderedDict(batch=batch, batch_idx=batch_idx) if self._takes_index else OrderedDict(batch=batch)
        with self._as_trained(listener, in_float32=in_float32), _accumulating(self.trainer, accumulates=not closes):
            _call_lightning_module_hook(self.trainer, "on_train_batch_start", batch, batch_idx)
            if module.automatic_optimization:
                outputs: Any = loops.automatic_optimization.run(self.trainer.optimizers[0], batch_idx, arguments)
            else:
                outputs = loops.manual_optimization.run(arguments)
            _call_lightning_module_hook(self.trainer, "on_train_batch_end", outputs, batch, batch_idx)
        return outputs

    def loss_as_trained(self, batch: object, batch_idx: int, *, random: RandomState, at: Moment) -> Any:
        """Run `training_step` as `train` does, without backward pass and update, for automatic optimisation."""
        self.ranks.barrier("a last step", at.ordinal)
        self._begin_step(batch, random, at)
        arguments = (batch, batch_idx) if self._takes_index else (batch,)
        # Without a backward pass DDP's reducer would wait for one for ever.
        with self._as_trained(None, in_float32=False), _block_parallel_sync_behavior(self.trainer.strategy):
            _call_lightning_module_hook(self.trainer, "on_train_batch_start", batch, batch_idx)
            return self.trainer.strategy.training_step(*arguments)

    @property
    def cost(self) -> float:
        """Cost so far in training steps."""
        passes = self.steps - self.updates - self.graphs
        return COPY_COST + step_cost(updates=self.updates, passes=passes, gradients=self.graphs)

    def affords(self, question: str, *, updates: int = 0, passes: int = 0, gradients: int = 0) -> bool:
        """Whether a question fits into the allowance on all ranks, which must all ask; notes it if not.

        Args:
            question: For the report.
            updates: Replayed updates.
            passes: Forward passes.
            gradients: Forward passes with gradients.
        """
        too_much = not self.has_room(updates=updates, passes=passes, gradients=gradients)
        if self.ranks.any("what an examination may cost", mine=too_much):
            self.allowance.leave_out(question)
            return False
        return True

    def has_room(self, *, updates: int = 0, passes: int = 0, gradients: int = 0) -> bool:
        """Whether this cost fits into the allowance on this rank."""
        worth = step_cost(updates=updates, passes=passes, gradients=gradients)
        return self.cost + worth <= self.allowance.steps

    def rewind(self) -> None:
        """Restore weights, buffers, gradients, modes, attributes and batches."""
        self._put_back(trusting=not self._has_trained)
        self._mute()

    def release_batch(self, batch: object) -> None:
        """Restore one batch after its last backward pass and drop its copy."""
        held = self._batches.pop(id(batch), None)
        if held is not None:
            held[1].put_back()

    def _begin_step(self, batch: object, random: RandomState | None, at: Moment | None) -> None:
        self._keep(batch)
        if random is not None:
            random.restore()
        if at is not None:
            set_position(self.trainer, at)
            self._set_modes(at.ordinal)
        self.steps += 1

    def _set_modes(self, ordinal: int) -> None:
        changes = [k for k in self.modes if k <= ordinal]
        if changes:
            resting = set(self.modes[max(changes)])
            for name, part in self.module.named_modules():
                part.training = name not in resting

    def _precision(self, in_float32: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if in_float32 else self.trainer.precision_plugin.train_step_context()

    @contextlib.contextmanager
    def _as_trained(self, listener: Callback | None, *, in_float32: bool) -> Iterator[None]:
        trainer = self.trainer
        # The strategy enters the plugin's context itself; an empty one gives float32.
        precision = {"train_step_context": contextlib.nullcontext} if in_float32 else {}
        places: Places = [
            (vars(trainer), {"callbacks": [listener] if listener else []}),
            (vars(trainer.precision_plugin), precision),
        ]
        with torch.enable_grad(), without_schedulers(self.module), patched(places):
            yield

    def _put_back(self, *, trusting: bool = False) -> None:
        self._state.put_back()
        self._optimizers.put_back(trusting=trusting)
        self._has_trained = False
        for _, kept in self._batches.values():
            kept.put_back()
        self._batches.clear()

    def _keep(self, batch: object) -> None:
        if id(batch) in self._batches:
            self._batches[id(batch)][1].put_back()
        else:
            self._batches[id(batch)] = (batch, ObjectSnapshot([("batch", batch)]))

    def _mute(self) -> None:
        for part in self.module.modules():
            if isinstance(part, LightningModule):
                part.__dict__.update(dict.fromkeys(MUTED_METHODS, _swallow))
        self.module.__dict__["_current_fx_name"] = "training_step"

    def _end(self) -> None:
        try:
            self._put_back()
            self._state.forget_writes()
            self._optimizers.forget_writes()
        finally:
            self._context.put_back()
            self._random.restore()


@contextlib.contextmanager
def isolated(
    trainer: Trainer, module: LightningModule, *, with_optimizers: bool = False, ranks: Ranks = SINGLE_RANK
) -> Iterator[Sandbox]:
    """Run `training_step` again any number of times, and restore all state on leaving, to the bit.

    Restores weights, buffers, gradients, `requires_grad`, modes, hooks, random generators, torchmetrics, every
    attribute of the module tree, the batch, `trainer.should_stop`, the trainer's metrics and progress, parameter
    groups, schedulers and the loss scaler. `self.log`, `self.log_dict`, `self.print`, loggers, profiler and callbacks
    are muted.

    Cannot restore what `training_step` writes to files, sockets and its own writers, prints, keeps in globals or cells
    of closures, or what foreign forward hooks keep outside the module.

    Copies all this state on its own device, and blocks: for use after an episode, between two batches.

    Args:
        trainer: The trainer, in `on_train_batch_end` or another place between two batches.
        module: Its module.
        with_optimizers: Also restore the state of the optimizers, which will be stepped.
        ranks: The ranks that do the same with their own batches. A single one of several can only `step`, not `train`.

    Yields:
        The sandbox to run steps on.

    Raises:
        CannotReplay: The module is sharded, reads the data itself, or holds what cannot be restored. Nothing is changed
            then.
    """
    _refuse(trainer, module)
    sandbox = Sandbox(trainer, module, with_optimizers=with_optimizers, ranks=ranks)
    try:
        sandbox._context.mute()  # noqa: SLF001 - the two are one
        sandbox._mute()  # noqa: SLF001
        yield sandbox
    finally:
        sandbox._end()  # noqa: SLF001


def loss_of(outputs: object) -> Tensor | None:
    """The training loss in the output of `training_step`, with its graph; `None` without one. Never blocks."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Disable `torch.compile`, so that hooks and modes see every operation; does nothing before torch 2.6."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    with set_stance("force_eager") if set_stance else contextlib.nullcontext():
        yield


def _refuse(trainer: Trainer, module: LightningModule) -> None:
    if isinstance(trainer.strategy, SHARDED_STRATEGIES):
        msg = f"{type(trainer.strategy).__name__} shards the weights, so a single process cannot run a step"
        raise CannotReplay(msg)
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        msg = "training_step takes dataloader_iter: the batches that it draws cannot be put back"
        raise CannotReplay(msg)


def _roots(trainer: Trainer, module: LightningModule, with_optimizers: bool) -> list[tuple[str, object]]:
    scaler = scaler_of(trainer)
    return [
        ("module", module),
        ("trainer results", trainer._results),  # what `callback_metrics` is computed from, and cached in
        ("trainer metrics", vars(trainer._logger_connector)),  # holds the dicts behind `callback_metrics`
        ("optimizers", [] if with_optimizers else [o.param_groups for o in trainer.optimizers]),
        ("schedulers", [vars(c.scheduler) for c in trainer.lr_scheduler_configs]),
        ("loss scaler", vars(scaler) if scaler is not None else {}),
    ]


@contextlib.contextmanager
def _accumulating(trainer: Trainer, *, accumulates: bool) -> Iterator[None]:
    """Decide whether Lightning's loop steps, which otherwise depends on the training's present batch."""
    with patched([(trainer.fit_loop.epoch_loop.__dict__, {"_should_accumulate": lambda: accumulates})]):
        yield


def _with_loss(outputs: Any, losses: Sequence[Tensor]) -> Any:
    if not losses or loss_of(outputs) is not None:
        return outputs
    named = batch_losses(None, losses)
    total = torch.stack([loss.reshape(()) for loss in losses]).sum()
    return {**(outputs if isinstance(outputs, Mapping) else {}), **named, "loss": total}


def _swallow(*_: object, **__: object) -> None:
    """Replaces `self.log` and the like."""
