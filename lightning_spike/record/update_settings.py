"""Optimizer settings of the recent updates, which schedulers change with every step."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch

Settings = Sequence[Mapping[str, Any]]
"""Settings of one optimizer step: per parameter group the values that schedulers write (lr, momentum, betas, weight
decay), the optimizer under `PLACE` and the clipping under `CLIP`."""

PLACE: Final = "optimizer"
"""Key of the optimizer's index in `trainer.optimizers`."""
CLIP: Final = "clip"
"""Key of the value and algorithm of gradient clipping, where noted."""

WRITTEN_BY_SCHEDULERS: Final = ("lr", "momentum", "betas", "weight_decay")

MAX_BATCHES: Final = 144
"""Batches whose settings are kept: twice those that a replay can reach, as `REACH` in `live_scene`."""


class UpdateSettings(Participant):
    """Remembers the settings of the recent updates, for replays."""

    def __init__(self) -> None:
        self.by_ordinal: dict[int, list[Settings]] = {}
        """Settings of each optimizer step by batch ordinal, oldest first."""
        self.modes: dict[int, tuple[str, ...]] = {}
        """Names of the modules in eval mode, by the batch ordinal of each change."""
        self._training: list[bool] = []

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        training = [part.training for part in batch.module.modules()]
        if training != self._training:
            self._training = training
            self.modes[batch.at.ordinal] = tuple(n for n, part in batch.module.named_modules() if not part.training)
            if len(self.modes) > MAX_BATCHES:
                del self.modes[next(iter(self.modes))]

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        place = next((k for k, own in enumerate(batch.trainer.optimizers) if own is optimizer), 0)
        self.by_ordinal.setdefault(batch.at.ordinal, []).append(settings_of(optimizer, place, trainer=batch.trainer))
        if len(self.by_ordinal) > MAX_BATCHES:
            del self.by_ordinal[next(iter(self.by_ordinal))]

    @override
    def release(self) -> None:
        self.by_ordinal.clear()
        self.modes.clear()
        self._training = []


def settings_of(optimizer: Optimizer, place: int = 0, *, trainer: Trainer | None = None) -> Settings:
    """Copy the settings of an optimizer just before its step; no device read.

    Args:
        optimizer: The optimizer.
        place: Its index in `trainer.optimizers`.
        trainer: Its clipping is noted too.
    """
    noted: dict[str, Any] = {PLACE: place}
    if trainer is not None:
        algorithm = trainer.gradient_clip_algorithm
        noted[CLIP] = trainer.gradient_clip_val, None if algorithm is None else str(algorithm.value)
    return [
        noted | {key: copied(group[key]) for key in WRITTEN_BY_SCHEDULERS if key in group}
        for group in optimizer.param_groups
    ]


def copied(value: Any) -> Any:
    """A copy of a setting."""
    return value.detach().clone() if isinstance(value, Tensor) else value
