"""Participants of the shared loop: one method per phase of a training step, which does nothing unless overridden."""

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
    """The present batch of the loop."""

    trainer: Trainer
    module: LightningModule
    at: Moment
    batch: Any
    """The batch on its device; `training_step` can have changed it in place."""


class _Health(Protocol):
    """Health of the run by its loss."""

    @property
    def healthy(self) -> bool:
        """Whether no episode is open."""


class SharedFlight(Protocol):
    """The part of the flight that participants use."""

    @property
    def store(self) -> TrainerStateStore:
        """Record of the run."""

    @property
    def recorder(self) -> Recorder:
        """Collects the signals of the open row."""

    @property
    def episodes(self) -> _Health:
        """Judges the rows that arrived."""

    def share(self, kind: type[P], make: Callable[[], P], trainer: Trainer, module: LightningModule) -> P:
        """The shared participant of this kind, made at the first call."""


class Participant:
    """A callback, or something that several callbacks share (the batch ring, the snapshots).

    Each phase runs for all participants before the next begins, so the order of the callbacks makes no difference. An
    exception switches the participant off for the rest of the run, with one warning.

    ```
    attach            setup                     find shared parts, install what must precede the first batch
    begin             on_train_start            optimizers and loaders exist now
    sense_batch       on_train_batch_start      ┐
    sense_backward    on_before_backward        │ put signals into the recorder; no blocking read
    sense_gradients   on_before_optimizer_step  │
    sense_outcome     on_train_batch_end        ┘
    judge             on_train_batch_end        once per batch whose numbers are on the host
    act               on_train_batch_end        every batch, on every rank: dump, replay; leaves the run unchanged
    heal              on_train_batch_end        after `act` of all: the only phase that can change the run
    sense_validation  on_validation_end
    conclude          on_fit_end, on_exception  once, however the run ended
    explain           on_fit_end, on_exception  once, after `conclude` of all: rank, render, write
    release           teardown, on_exception    undo `attach`
    ```
    """

    flight: SharedFlight
    """Set before `attach`."""

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find shared parts and install what must precede the first batch."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepare for training: optimizers, schedulers and loaders exist, weights are on their device."""

    def sense_batch(self, batch: TrainingBatch) -> None:
        """Measure before the forward pass; like all phases but `act`, must not block or draw random numbers."""

    def sense_backward(self, batch: TrainingBatch, loss: Tensor) -> None:
        """Measure before each backward pass; automatic optimisation divides and scales `loss`."""

    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        """Measure complete gradients, synchronised, unscaled and unclipped; once per optimizer step."""

    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        """Measure after the batch and its update; `outputs` as in `on_train_batch_end`."""

    def judge(self, arrival: Arrival) -> None:
        """Judge a batch whose numbers are in the store now (on a GPU some batches late)."""

    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        """Act on new or changed episodes, at the end of every batch on every rank."""

    def heal(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        """Change the run, such as back to healthy weights, after the lab has seen the damaged ones."""

    def sense_validation(self, trainer: Trainer, module: LightningModule, at: Moment) -> None:
        """Measure after a validation (not the sanity check) that followed the batch `at`; can block."""

    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """Settle at the end of the run. No collective, as other ranks can be gone."""

    def explain(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """Report, after `conclude` of all. No collective."""

    def release(self) -> None:
        """Undo `attach`; can be called twice."""
