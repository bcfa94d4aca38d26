"""Run `training_step` again and leave no trace: afterwards everything is as before, to the bit."""

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
from lightning_spike.ranks.rank_coordination import ALONE, Ranks
from lightning_spike.records import Moment
from lightning_spike.sandbox.budget import COPIES, Allowance, steps_worth
from lightning_spike.sandbox.object_snapshot import ObjectSnapshot
from lightning_spike.sandbox.trainer_context import (
    Places,
    Surroundings,
    by_itself,
    open_window,
    patched,
    set_position,
    without_schedulers,
    without_updates,
)
from lightning_spike.signals.loss import batch_losses
from lightning_spike.signals.random_state import RandomState

SHARDED: Final = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Strategies under which a forward pass outside their own wrapper sees pieces of the weights only."""

MUTED: Final = ("log", "log_dict", "print")
"""What a `LightningModule` says to the outside in `training_step`."""


class Sandbox:
    """What the lab works with inside `isolated`: steps that can be run, and a state to come back to.

    Not made by hand; see `isolated`.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, *, with_optimizers: bool, ranks: Ranks) -> None:
        self.trainer = trainer
        self.module = module
        self.ranks = ranks
        """With whom steps are run."""
        self._takes_index = bool(
            is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        )  # Lightning's own rule
        self._random = RandomState.take()
        self._state = ObjectSnapshot(_roots(trainer, module, with_optimizers), leave=_left(trainer, with_optimizers))
        # Twice the size of the weights, and written by updates only: most rewinds need not copy it.
        self._optimizers = ObjectSnapshot(_optimizers(trainer) if with_optimizers else [], leave=module.parameters())
        self._has_trained = False
        self._surroundings = Surroundings(trainer)
        self._batches: dict[int, tuple[object, ObjectSnapshot]] = {}
        self.known: dict[tuple[int, ...], tuple[Any, object]] = {}
        """What was evaluated, by the identities of what it depends on; beside each is what has these identities, so
        that none is used again."""
        self.allowance = Allowance()
        """What may still be asked; without a limit at first."""
        self.updates = 0
        """How many of the steps were training steps, with their backward pass."""
        self.modes: Mapping[int, tuple[str, ...]] = {}
        """By the ordinal of the batch from which on they hold, the names of the modules in eval mode; empty for as they
        stand."""
        self.steps = 0
        """How often `training_step` was run: what an examination costs, whatever the machine …"""
        self.graphs = 0
        """… and how often of that to look at it, and with what a backward pass needs."""

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
        """Run `training_step` once to look at it.

        Under the run's own precision, without `torch.compile`, on this rank alone (`by_itself`).

        Buffers, counters and random states move on as they do in training; `rewind` takes them back. What the step
        writes into the batch stays there until the next step on this batch, `rewind` or the end, for a backward pass
        may need it.

        Under manual optimisation the step runs without its backward passes and updates: `manual_backward` takes down
        the loss, `step` runs its closure only, and `zero_grad`, toggling, clipping and schedulers do nothing. Not so
        for a bare `loss.backward()`.

        Args:
            batch: The batch, on the module's device.
            batch_idx: What is handed to `training_step` if it takes it.
            random: The state of the random generators to begin with; as it stands where none is given.
            at: Where in the run it was: what `global_step` and `current_epoch` tell the step; as they stand where it is
                not given.
            in_float32: Without autocast, in the precision of the weights.
            graph: Record what a backward pass needs.

        Returns:
            What `training_step` returned, with its graph if that was asked for; under manual optimisation, if that
            holds no loss, a dict with the `"loss"` of the backward pass, or with their sum and each of them
            (`"loss/backward0"`). Blocks as much as the step itself does.

        Raises:
            CannotReplay: The batch holds something that cannot be put back.
        """
        self._set_out(batch, random, at)
        self.graphs += graph
        arguments = (batch, batch_idx) if self._takes_index else (batch,)
        with (
            torch.set_grad_enabled(graph),
            eagerly(),
            by_itself(self.trainer, self.module),
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
        """Train on one batch as the run did.

        Lightning's own loop, its strategy, compiled code and the optimizers, and no callback but one.

        The module's hooks from `on_train_batch_start` to `on_train_batch_end` are run; schedulers are not stepped.
        Under DDP every rank must call it alike, and they set out together; a listener that must keep them together
        further on asks the `ranks` itself.

        Args:
            batch: As in `step`, as the next ones.
            batch_idx: Also where in an accumulation window the batch is.
            random: Taken before the batch.
            at: Where in the run it was.
            closes: The optimizer steps after this batch. Without a meaning under manual optimisation.
            listener: Gets `on_before_backward`, `on_after_backward` and `on_before_optimizer_step`, as any callback.
            in_float32: Without autocast.

        Returns:
            What `on_train_batch_end` is given: under automatic optimisation the loss, detached and divided by the
            accumulation.

        Raises:
            CannotReplay: The batch holds something that cannot be put back.
            Exception: What the listener or the module's code raises; `rewind` is needed then.
        """
        self.ranks.meet("a training step", at.ordinal)
        self._set_out(batch, random, at)
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
        """Run `training_step` as `train` does, without backward pass and update; for automatic optimisation."""
        self.ranks.meet("a last step", at.ordinal)
        self._set_out(batch, random, at)
        arguments = (batch, batch_idx) if self._takes_index else (batch,)
        # Without a backward pass DDP's reducer would wait for one for ever.
        with self._as_trained(None, in_float32=False), _block_parallel_sync_behavior(self.trainer.strategy):
            _call_lightning_module_hook(self.trainer, "on_train_batch_start", batch, batch_idx)
            return self.trainer.strategy.training_step(*arguments)

    @property
    def cost(self) -> float:
        """What was run so far, in training steps' worth of time."""
        passes = self.steps - self.updates - self.graphs
        return COPIES + steps_worth(updates=self.updates, passes=passes, gradients=self.graphs)

    def affords(self, question: str, *, updates: int = 0, passes: int = 0, gradients: int = 0) -> bool:
        """Whether a question that takes so much still fits into the allowance, on all ranks.

        If not, it is noted as left out. Every rank must ask alike.

        Args:
            question: In words, for the report.
            updates: Updates made again.
            passes: Forward passes.
            gradients: … and such as gradients are taken from.
        """
        too_much = not self.has_room(updates=updates, passes=passes, gradients=gradients)
        if self.ranks.any("what an examination may cost", mine=too_much):
            self.allowance.leave_out(question)
            return False
        return True

    def has_room(self, *, updates: int = 0, passes: int = 0, gradients: int = 0) -> bool:
        """Whether so much still fits into the allowance, on this rank."""
        worth = steps_worth(updates=updates, passes=passes, gradients=gradients)
        return self.cost + worth <= self.allowance.steps

    def rewind(self) -> None:
        """Bring weights, buffers, gradients, modes, attributes and batches back to what they were when the isolation began."""
        self._put_back(trusting=not self._has_trained)
        self._mute()

    def done_with(self, batch: object) -> None:
        """Put one batch back now, after the last backward pass that needs it, so that its copy can be let go."""
        held = self._batches.pop(id(batch), None)
        if held is not None:
            held[1].put_back()

    def _set_out(self, batch: object, random: RandomState | None, at: Moment | None) -> None:
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
        # The strategy enters the plugin's context by itself; float32 is had by giving it an empty one.
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

    def _begin(self) -> None:
        self._surroundings.mute()
        self._mute()

    def _mute(self) -> None:
        for part in self.module.modules():
            if isinstance(part, LightningModule):
                part.__dict__.update(dict.fromkeys(MUTED, _swallow))
        self.module.__dict__["_current_fx_name"] = "training_step"

    def _end(self) -> None:
        try:
            self._put_back()
            self._state.forget_writes()
            self._optimizers.forget_writes()
        finally:
            self._surroundings.put_back()
            self._random.restore()


@contextlib.contextmanager
def isolated(
    trainer: Trainer, module: LightningModule, *, with_optimizers: bool = False, ranks: Ranks = ALONE
) -> Iterator[Sandbox]:
    """Run `training_step` again, any number of times; on leaving, however that comes about, everything is as it was.

    As it was, to the bit: weights, buffers (also those that are not persistent), gradients, `requires_grad`, the mode
    of every submodule, hooks, all random generators (global ones, and those that hang on the module), torchmetrics and
    every attribute of the module tree down through lists, dicts, arrays and objects of the user's own, the batch,
    `trainer.should_stop`, the trainer's metrics, its progress, the optimizers' param groups, the schedulers and the
    loss scaler. `self.log`, `self.log_dict`, `self.print`, the loggers, the profiler and the trainer's callbacks hear
    nothing.

    Not undone, since nobody can: what `training_step` writes to a file, a socket or a writer object of its own, prints
    itself, keeps in a global or in the cell of a closure, and what forward hooks of other parties keep outside the
    module.

    Takes a copy of all this state on its own device, and blocks; for use after an episode, between two batches.

    Args:
        trainer: The trainer, in `on_train_batch_end` or another place between two batches.
        module: Its module.
        with_optimizers: Keep the state of the optimizers too, for they will be stepped.
        ranks: Those that do the same now, with their own batches. By itself a rank of several may look at steps
            (`Sandbox.step`), but not train.

    Yields:
        The sandbox to run steps on.

    Raises:
        CannotReplay: The module is sharded, reads the data itself, or holds what cannot be put back. Nothing has been
            touched then.
    """
    _refuse(trainer, module)
    sandbox = Sandbox(trainer, module, with_optimizers=with_optimizers, ranks=ranks)
    try:
        sandbox._begin()  # noqa: SLF001 - the two are one
        yield sandbox
    finally:
        sandbox._end()  # noqa: SLF001


def loss_of(outputs: object) -> Tensor | None:
    """The training loss in what `training_step` returned, with its graph; `None` where it returned none.

    Never blocks.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Without `torch.compile`, so that hooks and modes see every operation.

    Torch before 2.6 has no such switch, and none is set there.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    with set_stance("force_eager") if set_stance else contextlib.nullcontext():
        yield


def _refuse(trainer: Trainer, module: LightningModule) -> None:
    if isinstance(trainer.strategy, SHARDED):
        msg = f"under {type(trainer.strategy).__name__} the weights are in pieces; single processes cannot run a step by themselves"
        raise CannotReplay(msg)
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        msg = "training_step takes dataloader_iter: it draws the data itself, and what it drew cannot be put back"
        raise CannotReplay(msg)


def _roots(trainer: Trainer, module: LightningModule, with_optimizers: bool) -> list[tuple[str, object]]:
    scaler: object = getattr(trainer.precision_plugin, "scaler", None)
    return [
        ("module", module),
        ("trainer results", trainer._results),  # what `callback_metrics` is computed from, and cached in
        ("trainer metrics", vars(trainer._logger_connector)),  # holds the dicts behind `callback_metrics`
        ("optimizers", [] if with_optimizers else [o.param_groups for o in trainer.optimizers]),
        ("schedulers", [vars(c.scheduler) for c in trainer.lr_scheduler_configs]),
        ("loss scaler", vars(scaler) if scaler is not None else {}),
    ]


def _optimizers(trainer: Trainer) -> list[tuple[str, object]]:
    return [(f"optimizers[{place}]", vars(optimizer)) for place, optimizer in enumerate(trainer.optimizers)]


def _left(trainer: Trainer, with_optimizers: bool) -> list[object]:
    """Nobody but a stepping optimizer changes its state, and a copy of it would be twice that of the weights."""
    return list(trainer.optimizers) if with_optimizers else [o.state for o in trainer.optimizers]


@contextlib.contextmanager
def _accumulating(trainer: Trainer, *, accumulates: bool) -> Iterator[None]:
    """What Lightning's loop asks to know whether to step.

    By itself it would go by the batch that the training is at.
    """
    with patched([(trainer.fit_loop.epoch_loop.__dict__, {"_should_accumulate": lambda: accumulates})]):
        yield


def _with_loss(outputs: Any, losses: Sequence[Tensor]) -> Any:
    if not losses or loss_of(outputs) is not None:
        return outputs
    named = batch_losses(None, losses)
    total = torch.stack([loss.reshape(()) for loss in losses]).sum()
    return {**(outputs if isinstance(outputs, Mapping) else {}), **named, "loss": total}


def _swallow(*_: object, **__: object) -> None:
    """Stands in for `self.log` and its like."""
