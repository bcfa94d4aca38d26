"""Statistics of every batch, measured once for all callbacks."""

import dataclasses

from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.signals.batch import DISTINCT_BINS, BatchRoles, batch_signals


class BatchStatistics(Participant):
    """Records `batch_signals` of every batch."""

    def __init__(self) -> None:
        self.roles = BatchRoles()

    def take_roles(self, roles: BatchRoles) -> None:
        """Add roles; those that are `None` keep their present value."""
        given = {name: path for name, path in dataclasses.asdict(roles).items() if path is not None}
        self.roles = dataclasses.replace(self.roles, **given)

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        for signal, value in batch_signals(batch.batch, self.roles).items():
            if value.dim():
                self.flight.store.layer_names.setdefault(signal, tuple(map(str, range(DISTINCT_BINS))))
                self.flight.recorder.put_vector(signal, value)
            else:
                self.flight.recorder.put(signal, value)
