"""The hooks that every callback of the suite has: the first one in the trainer's list drives the flight for all."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.loop import Flight
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import Participant
from lightning_spike.records import Disabled, RunStatus

A = ParamSpec("A")


class SpikeCallback(Participant, Callback):
    """Base of the suite's callbacks: Lightning's hooks on one side, the phases of `Participant` on the other.

    All callbacks of a trainer join one `Flight`. Lightning calls each of them at every hook; only the first in the list
    (the leader) passes the call on, so that each phase runs once, for everybody, whatever the order of the list.
    """

    flight: Flight
    _leads: bool = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        flight = Flight.of(trainer)
        if flight.taking_part(type(self)) is not None:
            name = type(self).__name__
            raise ConfigurationError.of(
                "Trainer(callbacks=...)", expected=f"one {name}", given=f"two of {name}", do="Leave one of them out."
            )
        self._leads = flight.taking_part(SpikeCallback) is None
        flight.join(self, trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads:
            self._drive(Flight.begin, trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._leads:
            self._drive(Flight.batch_start, trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._leads:
            self._drive(Flight.backward, loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._leads:
            self._drive(Flight.gradients, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leads:
            self._drive(Flight.batch_end, outputs)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads and not trainer.sanity_checking:
            self._drive(Flight.validation_end, trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads:
            self._drive(Flight.conclude, trainer, _status(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._leads:
            status = RunStatus.INTERRUPTED if isinstance(exception, KeyboardInterrupt) else RunStatus.EXCEPTION
            self._drive(Flight.conclude, trainer, status, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._leads and stage == "fit":
            self._drive(Flight.release)
        self._leads = False

    @override
    def state_dict(self) -> dict[str, Any]:
        """What this callback must remember over a resume; the leader adds what all share. Plain values only."""
        return self.own_state() | ({"flight": self.flight.state_dict()} if self._leads else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that wrote the checkpoint, the shared one too, whoever leads now."""
        state = dict(state_dict)
        if shared := state.pop("flight", None):
            self.flight.load_state_dict(shared)
        if state:
            self.load_own_state(state)

    def own_state(self) -> dict[str, Any]:
        """This callback's own part of `state_dict`; empty where it has none."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up what `own_state` gave."""

    def _drive(self, step: Callable[Concatenate[Flight, A], None], *args: A.args, **kwargs: A.kwargs) -> None:
        """Pass a hook on.

        If the loop itself breaks, nothing is sensed any more; the training goes on, and the report still comes and says
        so.
        """
        if self.flight.broken and step not in {Flight.conclude, Flight.release}:
            return
        try:
            step(self.flight, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
            self.flight.broken = True
            reason = f"{type(error).__name__}: {error}"
            self.flight.store.note(Disabled(part="Flight", reason=reason))
            warn(f"the suite broke and is switched off; the training goes on. {reason}")


def _status(trainer: Trainer) -> RunStatus:
    """How a fit that raised nothing has ended."""
    reached = (trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps) or (
        trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs
    )
    return RunStatus.STOPPED_EARLY if trainer.should_stop and not reached else RunStatus.FINISHED
