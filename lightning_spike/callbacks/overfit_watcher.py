"""`OverfitWatcher`: finds overfitting, and can stop the run and restore its best weights."""

import math
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.actions.stop import mean_over_ranks, stop_training
from lightning_spike.arguments import switch, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.warn import warn
from lightning_spike.record.state_copy import copy_module, load_module
from lightning_spike.records import Action, Disabled, EpisodeKind, Moment, ValidationPoint


class OverfitWatcher(SpikeCallback):
    """Finds the step from which the validation loss rises while the training loss still falls.

    After every validation the monitored loss is compared with its history and with the mean training loss since the
    previous validation. Overfitting is a rise of several times the noise over three validations, with a growing gap
    (see `OverfitDetector`). By default nothing is changed. `stop` ends the training once it has overfitted for
    `patience` validations. `restore_best` restores the weights of the best validation when training ends, before the
    last checkpoint is written. Under DDP the ranks' values are averaged for both, and all ranks act alike.

    A validation loss may fall again after a rise (double descent), and may rise while the accuracy still improves.
    "Overfitting" means here that the gap grows, not that more training is useless.

    Args:
        monitor: Name of the logged validation loss; lower is better. For an accuracy log its error as well.
        patience: Overfitted validations in a row before `stop` acts; 1 to stop at the first.
        stop: End the training when it overfits.
        restore_best: Restore the weights and buffers of the best validation at the end of training. One copy of them
            is kept; the optimizer's state stays that of the end.

    Raises:
        ConfigurationError: An argument is not of its kind.
    """

    def __init__(
        self, monitor: str = "val_loss", patience: int = 3, stop: bool = False, restore_best: bool = False
    ) -> None:
        self.monitor = _metric_name(monitor)
        self.patience = whole_number(
            "OverfitWatcher(patience)", patience, at_least=1, do="Use 3 to stop at the third validation in a row."
        )
        self.stop = switch("OverfitWatcher(stop)", stop, do="Use True to end the training when it overfits.")
        self.restore_best = switch(
            "OverfitWatcher(restore_best)", restore_best, do="Use True to end with the best weights."
        )
        self._forget()

    def _forget(self) -> None:
        self._best_value = math.inf
        self._best_at: Moment | None = None
        self._best_weights: dict[str, Tensor] | None = None
        self._last_value = math.nan
        self._last_ordinal = -1
        self._lasting = 0
        self._stopped = False
        self._is_missed = False

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._forget()

    @override
    def sense_validation(self, trainer: Trainer, module: LightningModule, at: Moment) -> None:
        value = self._value(trainer)
        if value is not None:
            self._judge_validation(at, value)
        if self.stop or self.restore_best:  # collectives: on every rank, whether it has a value or not
            self._keep_best(module, at, mean_over_ranks(trainer, value))
        if self.stop and not self._stopped:
            self._stop_if_lasting(trainer, at)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the best weights; Lightning's checkpoint callbacks come later, so the last checkpoint has them."""
        try:
            self._restore_best_weights(trainer, pl_module)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training must end as it would have
            self.flight.store.note(Disabled(part="OverfitWatcher", reason=f"{type(error).__name__}: {error}"))
            warn(f"OverfitWatcher could not put the best weights back. {error}")

    @override
    def release(self) -> None:
        self._best_weights = None

    @override
    def own_state(self) -> dict[str, Any]:
        best = self._best_at
        return {
            "best_value": self._best_value,
            "best_at": None if best is None else [best.ordinal, best.step, best.epoch, best.batch_idx],
            "last_ordinal": self._last_ordinal,
            "lasting": self._lasting,
        }

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._best_value, self._last_ordinal = state["best_value"], state["last_ordinal"]
        self._lasting = state["lasting"]
        if state["best_at"] is not None:
            ordinal, step, epoch, batch_idx = state["best_at"]
            self._best_at = Moment(ordinal=ordinal, step=step, epoch=epoch, batch_idx=batch_idx)

    def _value(self, trainer: Trainer) -> float | None:
        """The monitored value; `None`, with a remark, if it was not logged."""
        logged = trainer.callback_metrics.get(self.monitor)
        if logged is not None:
            return float(logged)
        if not self._is_missed:
            self._is_missed = True
            names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            self.flight.store.note(
                f"OverfitWatcher: no {self.monitor!r} was logged by the end of a validation, so overfitting cannot be "
                f"judged. Logged: {names}."
            )
        return None

    def _judge_validation(self, at: Moment, value: float) -> None:
        point = ValidationPoint(at=at, metric=self.monitor, value=value, train_loss=self._train_loss(at))
        self._last_value, self._last_ordinal = value, at.ordinal
        self.flight.store.note(point)
        self.flight.update_episodes(self.flight.episodes.observe_validation(point))
        self.flight.store.note(*self.flight.episodes.new_findings())
        episodes = self.flight.store.episodes
        overfits = any(e.kind is EpisodeKind.OVERFIT and e.signal == self.monitor and e.end is None for e in episodes)
        self._lasting = self._lasting + 1 if overfits else 0

    def _train_loss(self, at: Moment) -> float | None:
        """Mean of the recorded training losses since the previous validation."""
        losses = self.flight.store.history.between("loss", self._last_ordinal + 1, at.ordinal)
        finite = losses[np.isfinite(losses)]
        return float(finite.mean()) if finite.size else None

    def _keep_best(self, module: LightningModule, at: Moment, value: float | None) -> None:
        if value is None or not value < self._best_value:
            return
        self._best_value, self._best_at = value, at
        if self.restore_best:
            self._best_weights = copy_module(module, to_host=True)

    def _stop_if_lasting(self, trainer: Trainer, at: Moment) -> None:
        if stop_training(trainer, wanted=self._lasting >= self.patience):
            self._stopped = True
            detail = {"metric": self.monitor, "value": self._last_value, "validations": self._lasting}
            self.flight.store.note(Action(action="early_stop", at=at, detail=detail | self._best()))

    def _best(self) -> dict[str, Any]:
        if self._best_at is None:
            return {"best_value": None, "best_step": None}
        return {"best_value": self._best_value, "best_step": self._best_at.step}

    def _restore_best_weights(self, trainer: Trainer, module: LightningModule) -> None:
        best, now = self._best_at, self.flight.last_moment(trainer)
        if not self.restore_best or best is None or best.ordinal == now.ordinal:
            return
        if self._best_weights is None:
            self.flight.store.note(
                f"OverfitWatcher: the best weights (step {best.step}) are from before the resume and not in its "
                "checkpoint, so the last ones stay."
            )
            return
        load_module(module, self._best_weights)
        detail = {"metric": self.monitor, "value": self._last_value} | self._best()
        self.flight.store.note(Action(action="restore_best", at=now, detail=detail))


def _metric_name(given: object) -> str:
    if isinstance(given, str) and given:
        return given
    raise ConfigurationError.of(
        "OverfitWatcher(monitor)",
        expected="the name of a logged metric",
        given=given,
        do="Use the name that validation_step logs the loss under, such as 'val_loss'.",
    )
