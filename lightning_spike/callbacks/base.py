"""The hooks that every callback of the suite has: the first one in the trainer's list drives the flight for all."""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Final, ParamSpec

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.loop import Flight
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import Participant
from lightning_spike.records import Disabled, RunStatus
from lightning_spike.signals.learning_rate import optimizer_names

A = ParamSpec("A")
MAX_NAMES: Final = 8
"""Names that one finding lists; engineering choice."""


class SpikeCallback(Participant, Callback):
    """Base of the suite's callbacks: Lightning's hooks on one side, the phases of `Participant` on the other.

    All callbacks of a trainer join one `Flight`. Lightning calls each of them at every hook. Only the first in the list
    (the leader) passes the call on, so each phase runs once for all of them, in any order of the list.
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
        """This callback's state for a checkpoint, plain values only; the leader adds the shared state."""
        return self.own_state() | ({"flight": self.flight.state_dict()} if self._leads else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, with the shared state, whichever callback leads now."""
        state = dict(state_dict)
        if shared := state.pop("flight", None):
            self.flight.load_state_dict(shared)
        if state:
            self.load_own_state(state)

    def own_state(self) -> dict[str, Any]:
        """This callback's own part of `state_dict`; empty by default."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""

    def _drive(self, step: Callable[Concatenate[Flight, A], None], *args: A.args, **kwargs: A.kwargs) -> None:
        """Run one step of the flight.

        If it raises, recording stops and the training continues. The report is still written and names the error.
        """
        if self.flight.broken and step not in {Flight.conclude, Flight.release}:
            return
        try:
            step(self.flight, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
            self.flight.broken = True
            reason = f"{type(error).__name__}: {error}"
            self.flight.store.note(Disabled(part="Flight", reason=reason))
            warn(f"the suite broke and is switched off; the training continues. {reason}")


def first_names(names: Sequence[str]) -> list[str]:
    """The names that a finding lists: the first `MAX_NAMES`."""
    return list(names[:MAX_NAMES])


def counted(names: Sequence[str], total: int, text: str) -> dict[str, Any]:
    """The detail of a finding about `names`, some of `total` modules or parameters."""
    return {"names": first_names(names), "count": len(names), "of": total, "text": text}


def plain_name(name: str) -> str:
    """A parameter's name without the prefix that `torch.compile` adds."""
    return name.replace("_orig_mod.", "")


def names_by_optimizer(trainer: Trainer) -> dict[int, str]:
    """Lightning's name of each optimizer, by its id."""
    return dict(zip(map(id, trainer.optimizers), optimizer_names(trainer.optimizers), strict=True))


def _status(trainer: Trainer) -> RunStatus:
    """Returns the status of a fit that raised nothing."""
    reached = (trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps) or (
        trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs
    )
    return RunStatus.STOPPED_EARLY if trainer.should_stop and not reached else RunStatus.FINISHED
