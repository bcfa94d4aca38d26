"""The trainer around a training step: muted during a replay and restored afterwards."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, NoReturn, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_spike.errors import CannotReplay
from lightning_spike.records import Moment

Places: TypeAlias = Sequence[tuple[MutableMapping[str, Any], Mapping[str, Any]]]
"""Namespaces (`vars(thing)`), each with its temporary values."""

HELD: Final = ("callbacks", "should_stop", "profiler", "gradient_clip_val", "gradient_clip_algorithm")
"""Attributes of the trainer that a replay changes."""

_MISSING: Final = object()


class TrainerContext:
    """The trainer's callbacks, loggers, profiler, progress and `should_stop`, and DDP's flags.

    Args:
        trainer: The trainer, between two batches.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        held: dict[str, Any] = vars(trainer)
        self._held: dict[str, Any] = {name: held[name] for name in HELD}
        self._wrapper = _ddp_flags(trainer)
        self._loggers = list(trainer.loggers)
        # Lightning's manual loop sets them
        self._hooks = [(o, o._on_before_step, o._on_after_step) for o in trainer.strategy._lightning_optimizers]
        epoch_loop = trainer.fit_loop.epoch_loop
        progress = (
            epoch_loop.automatic_optimization.optim_progress,
            epoch_loop.manual_optimization.optim_step_progress,
            trainer.fit_loop.epoch_progress,
        )
        self._progress = [(part, dict(vars(part))) for whole in progress for part in _parts(whole)]

    def mute(self) -> None:
        """Mute callbacks, loggers and profiler."""
        self._trainer.loggers = [DummyLogger() for _ in self._loggers]
        vars(self._trainer).update(callbacks=[], profiler=PassThroughProfiler())

    def put_back(self) -> None:
        """Restore everything."""
        vars(self._trainer).update(self._held)
        _set_ddp_flags(self._trainer, self._wrapper)
        self._trainer.loggers = self._loggers
        for optimizer, before, after in self._hooks:
            optimizer._on_before_step, optimizer._on_after_step = before, after  # as above
        for part, values in self._progress:
            vars(part).update(values)


def open_window(trainer: Trainer) -> None:
    """Begin an accumulation window: DDP then broadcasts the buffers of rank 0 before the next forward pass."""
    _set_ddp_flags(trainer, dict.fromkeys(_ddp_flags(trainer), True))


def set_position(trainer: Trainer, at: Moment) -> None:
    """Set `global_step` and `current_epoch`, by the counters that they read."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = at.step
    epoch_loop.manual_optimization.optim_step_progress.total.completed = at.step
    trainer.fit_loop.epoch_progress.current.completed = at.epoch


@contextlib.contextmanager
def patched(places: Places) -> Iterator[None]:
    """Put temporary values into namespaces."""
    before = [(held, {name: held.get(name, _MISSING) for name in values}) for held, values in places]
    try:
        for held, values in places:
            held.update(values)
        yield
    finally:
        for held, values in before:
            for name, value in values.items():
                if value is _MISSING:
                    held.pop(name, None)
                else:
                    held[name] = value


def _ddp_flags(trainer: Trainer) -> dict[str, bool]:
    """Whether buffers are broadcast before the next forward pass; empty without DDP."""
    held: dict[str, Any] = getattr(trainer.strategy.model, "__dict__", {})
    return {name: held[name] for name in ("require_forward_param_sync",) if name in held}


def _set_ddp_flags(trainer: Trainer, flags: Mapping[str, bool]) -> None:
    for name, value in flags.items():
        setattr(trainer.strategy.model, name, value)


def _parts(progress: Any) -> Iterator[Any]:
    yield progress
    for field in dataclasses.fields(progress):
        value = getattr(progress, field.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value)


COLLECTIVES: Final = ("all_gather", "all_reduce", "reduce", "reduce_boolean_decision", "broadcast", "barrier")
"""Methods of Lightning's strategies that wait for other ranks."""


@contextlib.contextmanager
def on_one_rank(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Make SyncBatchNorm normalise by this rank's batch alone, and refuse Lightning's collectives.

    Does nothing in a single process. Does not see direct calls of `torch.distributed`.
    """
    if trainer.world_size == 1:
        yield
        return
    synced = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)]
    strategy: Any = trainer.strategy
    places: Places = [
        *((vars(part), {"forward": functools.partial(_BatchNorm.forward, part)}) for part in synced),
        (vars(strategy), {name: functools.partial(_refuse, name) for name in COLLECTIVES if hasattr(strategy, name)}),
    ]
    with patched(places):
        yield


def _refuse(name: str, *_: object, **__: object) -> NoReturn:
    msg = f"training_step calls {name} across the ranks, so it cannot run on one alone"
    raise CannotReplay(msg)


@contextlib.contextmanager
def without_updates(module: LightningModule) -> Iterator[list[Tensor]]:
    """Make `manual_backward` only record its loss, and a step only run its closure.

    `zero_grad`, toggling, clipping and schedulers do nothing. Automatic optimisation is not changed.

    Args:
        module: Attached to its trainer.

    Yields:
        The losses of the backward passes with their graphs, in order, filled while the step runs.
    """
    losses: list[Tensor] = []
    if module.automatic_optimization:
        yield losses
        return

    def backward(loss: Tensor, *_: object, **__: object) -> None:
        losses.append(loss)

    muted = ("toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    of_module = {"manual_backward": backward} | dict.fromkeys(muted, _nothing)
    # what self.optimizers() returns
    optimizers = [*module.trainer.strategy._lightning_optimizers, *module.trainer.optimizers]
    of_optimizers = {"step": _closure_only, "zero_grad": _nothing}
    places: Places = [(vars(module), of_module), *((vars(optimizer), of_optimizers) for optimizer in optimizers)]
    with patched(places), without_schedulers(module):
        yield losses


@contextlib.contextmanager
def without_schedulers(module: LightningModule) -> Iterator[None]:
    """Make the `step` of schedulers do nothing, as a replay takes the settings from the record."""
    schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
    with patched([(vars(scheduler), {"step": _nothing}) for scheduler in schedulers]):
        yield


def _nothing(*_: object, **__: object) -> None:
    """Replaces a method that changes the state."""


def _closure_only(closure: Callable[[], Any] | None = None, **_: object) -> Any:
    return closure() if closure is not None else None
