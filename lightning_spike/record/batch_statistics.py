"""The statistics of every batch, measured once for all who want them."""

from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.signals.batch import DISTINCT_BINS, BatchRoles, batch_signals


class BatchStatistics(Participant):
    """Puts `batch_signals` of every batch into the recorder."""

    def __init__(self) -> None:
        self.roles = BatchRoles()

    def take_roles(self, roles: BatchRoles) -> None:
        """Take over which part of a batch is what.

        Of what one callback leaves to the convention, another may say it.
        """
        self.roles = BatchRoles(
            target=self.roles.target if roles.target is None else roles.target,
            weight=self.roles.weight if roles.weight is None else roles.weight,
            input=self.roles.input if roles.input is None else roles.input,
        )

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        for signal, value in batch_signals(batch.batch, self.roles).items():
            if value.dim():
                self.flight.store.layer_names.setdefault(signal, tuple(map(str, range(DISTINCT_BINS))))
                self.flight.recorder.put_vector(signal, value)
            else:
                self.flight.recorder.put(signal, value)
