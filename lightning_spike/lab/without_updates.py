"""Under manual optimisation, `training_step` without what it does to the weights: only the losses are left."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_spike.lab.surroundings import Places, standing_in

__all__ = ["without_schedulers", "without_updates"]


@contextlib.contextmanager
def without_updates(module: LightningModule) -> Iterator[list[Tensor]]:
    """Make `manual_backward` take down its loss, a step run its closure only, and `zero_grad`, toggling, clipping and schedulers do nothing.

    All gradients that are asked for afterwards are there, whatever the step toggles. Automatic optimisation is left as it is.

    Args:
        module: Attached to its trainer.

    Yields:
        The losses of the backward passes, with their graphs, in order; filled while the step runs.
    """
    losses: list[Tensor] = []
    if module.automatic_optimization:
        yield losses
        return

    def backward(loss: Tensor, *_: object, **__: object) -> None:
        losses.append(loss)

    of_module = {
        "manual_backward": backward,
        "toggle_optimizer": _nothing,
        "untoggle_optimizer": _nothing,
        "clip_gradients": _nothing,
    }
    optimizers = [*module.trainer.strategy._lightning_optimizers, *module.trainer.optimizers]  # noqa: SLF001 - what self.optimizers() gives
    of_optimizers = {"step": _closure_only, "zero_grad": _nothing}
    places: Places = [(vars(module), of_module), *((vars(optimizer), of_optimizers) for optimizer in optimizers)]
    with standing_in(places), without_schedulers(module):
        yield losses


@contextlib.contextmanager
def without_schedulers(module: LightningModule) -> Iterator[None]:
    """Make the `step` of schedulers do nothing: in a re-run the settings come from the record, and a schedule may end where the run does."""
    schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
    with standing_in([(vars(scheduler), {"step": _nothing}) for scheduler in schedulers]):
        yield


def _nothing(*_: object, **__: object) -> None:
    """Stands in for what changes the state."""


def _closure_only(closure: Callable[[], Any] | None = None, **_: object) -> Any:  # noqa: ANN401 - what the closure returns
    return closure() if closure is not None else None
