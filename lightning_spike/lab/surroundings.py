"""What a training step meets in the trainer around it: muted while the lab is at work, and put back afterwards."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_spike.records import Moment

__all__ = ["Places", "Surroundings", "open_window", "set_position", "standing_in"]

Places: TypeAlias = Sequence[tuple[MutableMapping[str, Any], Mapping[str, Any]]]
"""Namespaces (`vars(thing)`), each with what is to stand in it."""

HELD: Final = ("callbacks", "should_stop", "profiler", "gradient_clip_val", "gradient_clip_algorithm")
"""Attributes of the trainer that the lab sets."""

_MISSING: Final = object()


class Surroundings:
    """The trainer's callbacks, loggers, profiler, progress, its wish to stop, and what DDP remembers from one forward pass to the next.

    Args:
        trainer: As it stands between two batches.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        held: dict[str, Any] = vars(trainer)
        self._held: dict[str, Any] = {name: held[name] for name in HELD}
        self._wrapper = _ddp_flags(trainer)
        self._loggers = list(trainer.loggers)
        self._hooks = [(o, o._on_before_step, o._on_after_step) for o in trainer.strategy._lightning_optimizers]  # noqa: SLF001 - Lightning's manual loop sets them
        epoch_loop = trainer.fit_loop.epoch_loop
        progress = (
            epoch_loop.automatic_optimization.optim_progress,
            epoch_loop.manual_optimization.optim_step_progress,
            trainer.fit_loop.epoch_progress,
        )
        self._progress = [(part, dict(vars(part))) for whole in progress for part in _parts(whole)]

    def mute(self) -> None:
        """Callbacks, loggers and profiler hear nothing from now on."""
        self._trainer.loggers = [DummyLogger() for _ in self._loggers]
        vars(self._trainer).update(callbacks=[], profiler=PassThroughProfiler())

    def put_back(self) -> None:
        """Everything as it was found."""
        vars(self._trainer).update(self._held)
        _set_ddp_flags(self._trainer, self._wrapper)
        self._trainer.loggers = self._loggers
        for optimizer, before, after in self._hooks:
            optimizer._on_before_step, optimizer._on_after_step = before, after  # noqa: SLF001 - as above
        for part, values in self._progress:
            vars(part).update(values)


def open_window(trainer: Trainer) -> None:
    """As after an update: DDP then sends the buffers of rank 0 to all before the next forward pass, which it does not between batches that accumulate."""
    _set_ddp_flags(trainer, dict.fromkeys(_ddp_flags(trainer), True))


def set_position(trainer: Trainer, at: Moment) -> None:
    """Make `global_step` and `current_epoch` tell this place; these counters are all that they read."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = at.step
    epoch_loop.manual_optimization.optim_step_progress.total.completed = at.step
    trainer.fit_loop.epoch_progress.current.completed = at.epoch


@contextlib.contextmanager
def standing_in(places: Places) -> Iterator[None]:
    """Put other values into namespaces for a while."""
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
    """Whether buffers are sent round before the next forward pass; empty without DDP."""
    held: dict[str, Any] = getattr(trainer.strategy.model, "__dict__", {})
    return {name: held[name] for name in ("require_forward_param_sync",) if name in held}


def _set_ddp_flags(trainer: Trainer, flags: Mapping[str, bool]) -> None:
    for name, value in flags.items():
        setattr(trainer.strategy.model, name, value)


def _parts(progress: Any) -> Iterator[Any]:  # noqa: ANN401 - nested dataclasses of Lightning
    yield progress
    for field in dataclasses.fields(progress):
        value = getattr(progress, field.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value)
