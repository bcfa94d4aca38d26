"""What the optimizers were set to in the recent updates.

Schedulers move it with every step, and nobody else remembers it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch

Settings = Sequence[Mapping[str, Any]]
"""Of one optimizer step, for every parameter group what schedulers write (lr, momentum, betas, weight decay), under
`PLACE` whose step it is, and under `CLIP` how gradients were clipped."""

PLACE: Final = "optimizer"
"""The place of the optimizer in `trainer.optimizers`; not an entry of the parameter group."""
CLIP: Final = "clip"
"""The value and the algorithm that the trainer clipped gradients by, where that was noted; no entry of the parameter
group either."""

WRITTEN_BY_SCHEDULERS: Final = ("lr", "momentum", "betas", "weight_decay")

HELD: Final = 144
"""Batches with an update whose settings are kept: twice as many as batches are held for a re-run (`live_scene.REACH`),
some numbers each."""


class UpdateSettings(Participant):
    """Remembers the settings of the recent updates.

    Shared by all callbacks that run some again, or write down how to.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[Settings]] = {}
        self._modes: dict[int, tuple[str, ...]] = {}
        self._training: list[bool] = []

    @property
    def by_ordinal(self) -> Mapping[int, Sequence[Settings]]:
        """One entry for each optimizer step, by the ordinal of the batch they were made in.

        The live record, oldest first.
        """
        return self._held

    @property
    def modes(self) -> Mapping[int, tuple[str, ...]]:
        """The names of the modules in eval mode, by the ordinal of the batch from which on.

        An entry for each change.
        """
        return self._modes

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        training = [part.training for part in batch.module.modules()]
        if training != self._training:
            self._training = training
            self._modes[batch.at.ordinal] = tuple(n for n, part in batch.module.named_modules() if not part.training)
            if len(self._modes) > HELD:
                del self._modes[next(iter(self._modes))]

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        self._held.setdefault(batch.at.ordinal, []).append(
            settings_of(optimizer, _place(batch, optimizer), trainer=batch.trainer)
        )
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]

    @override
    def release(self) -> None:
        self._held.clear()
        self._modes.clear()
        self._training = []


def settings_of(optimizer: Optimizer, place: int = 0, *, trainer: Trainer | None = None) -> Settings:
    """What schedulers write into an optimizer's groups, to be taken just before its step; copies, no device read.

    Args:
        optimizer: The one that is about to step.
        place: Its place in `trainer.optimizers`.
        trainer: Whose clipping is noted too.
    """
    noted = {PLACE: place} if trainer is None else {PLACE: place, CLIP: _clip_of(trainer)}
    return [
        noted | {key: copied(group[key]) for key in WRITTEN_BY_SCHEDULERS if key in group}
        for group in optimizer.param_groups
    ]


def _place(batch: TrainingBatch, optimizer: Optimizer) -> int:
    return next((k for k, own in enumerate(batch.trainer.optimizers) if own is optimizer), 0)


def _clip_of(trainer: Trainer) -> tuple[float | None, str | None]:
    algorithm = trainer.gradient_clip_algorithm
    return trainer.gradient_clip_val, None if algorithm is None else str(algorithm.value)


def copied(value: Any) -> Any:
    """A setting as it is now, whoever writes into it later."""
    return value.detach().clone() if isinstance(value, Tensor) else value
