"""What the optimizers were set to in the recent updates: schedulers move it with every step, and nobody else remembers it."""

from collections.abc import Mapping, Sequence
from typing import Final

from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.flight.participant import Participant, TrainingBatch
from lightning_spike.lab.update import Settings, settings_of

__all__ = ["UpdateSettings"]

HELD: Final = 144
"""Batches with an update whose settings are kept: twice as many as batches are held for a re-run (`live_scene.REACH`), some numbers each."""


class UpdateSettings(Participant):
    """Remembers the settings of the recent updates; shared by all callbacks that run some again, or write down how to."""

    def __init__(self) -> None:
        self._held: dict[int, list[Settings]] = {}
        self._modes: dict[int, tuple[str, ...]] = {}
        self._training: list[bool] = []

    @property
    def by_ordinal(self) -> Mapping[int, Sequence[Settings]]:
        """One entry for each optimizer step, by the ordinal of the batch they were made in; the live record, oldest first."""
        return self._held

    @property
    def modes(self) -> Mapping[int, tuple[str, ...]]:
        """The names of the modules in eval mode, by the ordinal of the batch from which on; an entry for each change."""
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


def _place(batch: TrainingBatch, optimizer: Optimizer) -> int:
    return next((k for k, own in enumerate(batch.trainer.optimizers) if own is optimizer), 0)
