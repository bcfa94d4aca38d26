"""What may take part in the shared loop.

The phases of one training step, each a method that does nothing until overridden.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_spike.record.recorder import Arrival, Recorder
from lightning_spike.records import Episode, Moment, RunStatus
from lightning_spike.store import TrainerStateStore

P = TypeVar("P", bound="Participant")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """The batch that the loop is at, as the hooks hand it on."""

    trainer: Trainer
    module: LightningModule
    at: Moment
    batch: Any
    """The batch itself, on its device; `training_step` may have changed it in place by the time it ended."""


class _Course(Protocol):
    """How the run goes, by the loss."""

    @property
    def healthy(self) -> bool:
        """No trouble is open."""


class SharedFlight(Protocol):
    """What participants use of the flight that they take part in."""

    @property
    def store(self) -> TrainerStateStore:
        """What is known of the run."""

    @property
    def recorder(self) -> Recorder:
        """Takes the signals of the open row."""

    @property
    def episodes(self) -> _Course:
        """Judges the rows that have arrived."""

    def share(self, kind: type[P], make: Callable[[], P], trainer: Trainer, module: LightningModule) -> P:
        """The one participant of this kind that all share; made by the first that asks."""


class Participant:
    """One part of the suite: a callback, or something that several callbacks share (the batch ring, the snapshots).

    The phases come in this order, and each runs for *all* participants before the next begins; so the order of the
    callbacks in the Trainer's list makes no difference. An exception in any of them switches this participant off for
    the rest of the run, with one warning.

    ```
    attach            setup                     find what is shared, install what must be in place before the first
    batch begin             on_train_start            optimizers and loaders exist now sense_batch
    on_train_batch_start      ┐ sense_backward    on_before_backward        │ put signals into the recorder; no blocking
    read sense_gradients   on_before_optimizer_step  │ sense_outcome     on_train_batch_end        ┘ judge
    on_train_batch_end        once for every batch whose numbers have arrived on the host
    act               on_train_batch_end        every batch, on every rank: dump, replay, whatever leaves the run as it
    is
    heal              on_train_batch_end        when all have acted: the one phase that may change the run
    sense_validation  on_validation_end
    conclude          on_fit_end, on_exception  once, however the run ended
    explain           on_fit_end, on_exception  once, when all have concluded: rank, render, write
    release           teardown, on_exception    undo what `attach` installed
    ```
    """

    flight: SharedFlight
    """Set before `attach`."""

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find what is shared, install what must be in place before the first batch is drawn."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Training is about to start: optimizers, schedulers and loaders exist, weights are on their device."""

    def sense_batch(self, batch: TrainingBatch) -> None:
        """Before the batch's forward pass. Must not block and not draw random numbers, as all that follow but `act`."""

    def sense_backward(self, batch: TrainingBatch, loss: Tensor) -> None:
        """Before each backward pass; under automatic optimisation `loss` is divided by the accumulation and scaled."""

    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        """Gradients are complete, synchronised, unscaled and not yet clipped; once for each optimizer that steps."""

    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        """After the batch, its update included; `outputs` as Lightning hands it to `on_train_batch_end`."""

    def judge(self, arrival: Arrival) -> None:
        """A batch's numbers have arrived (on a GPU some batches late) and are in the store."""

    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        """Do something about it.

        Called at the end of every batch on every rank, with the episodes that are new or have changed.
        """

    def heal(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        """Change the run, back to healthy weights say.

        After `act` of all, so that the lab still finds the weights as the trouble left them.
        """

    def sense_validation(self, trainer: Trainer, module: LightningModule, at: Moment) -> None:
        """A validation (not the sanity check) has ended after the training batch `at`.

        Reading metrics may block here.
        """

    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """The run is over, all rows have arrived. No collective: other ranks may be gone."""

    def explain(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """All have concluded and the store is as it will stay; only the report takes part in this one.

        No collective either.
        """

    def release(self) -> None:
        """Undo what `attach` installed; may be called twice."""
