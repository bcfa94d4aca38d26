"""`AnomalyRollback`: restores the last healthy snapshot during `fit` if the loss does not recover."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_spike.actions.lr_cut import LearningRateCut
from lightning_spike.actions.restore import restore
from lightning_spike.actions.rollback_policy import RollbackPolicy, RollbackRequest
from lightning_spike.actions.stop import decide_together
from lightning_spike.arguments import number, switch, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.snapshot import NEAR_SLOTS, Snapshot, Snapshots, refuses_snapshots
from lightning_spike.records import Action, Episode

MARKER: Final = "spike/rollback"
"""Metric logged at a rollback: the number of rollbacks so far."""
TOGETHER_EVERY: Final = 8
"""Optimizer steps between joint decisions of several ranks on accelerators, each of which waits for the device."""


class AnomalyRollback(SpikeCallback):
    """Restores the last healthy snapshot during `fit` if the loss is not finite or does not recover.

    Weights, buffers, optimizer states, loss scale and averaged models (EMA, SWA) are restored. Learning rates,
    schedulers, loops, random states and the loggers' step axis are not, and the training continues with the next
    batches. Gradients are dropped; non-finite running means and metrics are reset. A non-finite loss causes a rollback
    at once, but under a GradScaler, which skips such updates, only if it stays. A spike or divergence causes one after
    `patience` batches. Under DDP all ranks decide together and restore the same snapshot. Loggers get `spike/rollback`;
    the report has an action with the lost steps.

    Each rollback in a row doubles the patience for the next and delays it by 0, 1, 3, 7, … batches. After
    `max_rollbacks` the training continues without rollbacks, and the report says so.

    Args:
        patience: Batches in which a spike or divergence may recover without a rollback.
        max_rollbacks: Maximum number of rollbacks in the whole run, resumes included.
        lr_scale: Factor on all learning rates after each rollback, 1.0 for none. Factors of several rollbacks multiply.
            It works with any scheduler: each rate is the scheduled rate times the factor.
        reset_optimizer: Start with empty optimizer states (momentum, second moments) instead of the snapshot's.
        every: Batches between two snapshots. A rollback loses at most so many, plus the delay of the detection.
        memory_mb: Memory for all snapshots together, on the host if they are large; two must fit (12 bytes per
            parameter each under Adam).
        cooldown: Normal losses in a row after which a rollback counts as successful.

    Raises:
        ConfigurationError: An argument is out of its range; or, when `fit` begins, the strategy (FSDP, DeepSpeed,
            ModelParallel) cannot put its state back in memory.
    """

    def __init__(
        self,
        patience: int = 30,
        max_rollbacks: int = 5,
        lr_scale: float = 1.0,
        reset_optimizer: bool = False,
        every: int = 50,
        memory_mb: int = 4096,
        cooldown: int = 100,
    ) -> None:
        self.patience = whole_number(
            "AnomalyRollback(patience)", patience, at_least=1, do="Use 30 to give a spike 30 batches to come back."
        )
        self.max_rollbacks = whole_number(
            "AnomalyRollback(max_rollbacks)", max_rollbacks, at_least=1, do="Leave the callback out for no rollbacks."
        )
        self.lr_scale = number(
            "AnomalyRollback(lr_scale)", lr_scale, above=0.0, at_most=1.0, do="Use 0.5 to halve the rate each time."
        )
        self.reset_optimizer = switch(
            "AnomalyRollback(reset_optimizer)", reset_optimizer, do="Use True to drop momentum and second moments."
        )
        self.every = whole_number(
            "AnomalyRollback(every)", every, at_least=1, do="Use 50 for a snapshot every 50 batches."
        )
        self.memory_mb = whole_number(
            "AnomalyRollback(memory_mb)", memory_mb, at_least=1, do="Use 4096 for 4 GB in all."
        )
        self.cooldown = whole_number(
            "AnomalyRollback(cooldown)", cooldown, at_least=1, do="Use 100 for 100 healthy batches."
        )
        self._policy = self._new_policy()
        self._cut = LearningRateCut()
        self._snapshots = Snapshots()
        self._request: RollbackRequest | None = None
        self._windows = 0

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        if (why := refuses_snapshots(trainer)) is not None:
            raise ConfigurationError.of(
                "Trainer(strategy=...)",
                expected="a strategy with whole weights on every rank",
                given=type(trainer.strategy).__name__,
                do=f"{why} Leave AnomalyRollback out, or use strategy='ddp'.",
            )
        self._policy, self._cut, self._request, self._windows = self._new_policy(), LearningRateCut(), None, 0
        self._snapshots = self.flight.share(Snapshots, Snapshots, trainer, module)
        self._snapshots.want(every=self.every, memory_mb=self.memory_mb)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._cut.install(trainer.optimizers)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            self._policy.under_scaler()

    @override
    def judge(self, arrival: Arrival) -> None:
        self._policy.judge(arrival.row, healthy=self.flight.episodes.healthy)

    @override
    def heal(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        request = self._policy.request(batch.at.ordinal, changed, self.flight.store)
        if self._policy.spent:
            self._note_spent(request)
            return
        self._request = request or self._request
        # Lightning's own test, the short last window included: half a window's gradients belong to the lost steps.
        if batch.trainer.fit_loop.epoch_loop._should_accumulate() or not self._is_time(batch.trainer):
            return
        if decide_together(batch.trainer, wanted=self._request is not None):
            self._roll_back(
                batch, self._request or RollbackRequest(reason="another_rank", onset=batch.at.ordinal, episode=None)
            )
        self._request = None

    @override
    def release(self) -> None:
        self._cut.remove()

    @override
    def own_state(self) -> dict[str, Any]:
        return {"rollbacks": self._policy.rollbacks, "lr_factor": self._cut.factor}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._policy.rollbacks = state["rollbacks"]
        self._cut.factor = state["lr_factor"]

    def _new_policy(self) -> RollbackPolicy:
        return RollbackPolicy(patience=self.patience, max_rollbacks=self.max_rollbacks, cooldown=self.cooldown)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether the ranks decide at this step: always in one process or on the CPU, else every 8th step."""
        self._windows += 1
        free = trainer.world_size == 1 or trainer.strategy.root_device.type == "cpu"
        return free or self._windows % TOGETHER_EVERY == 0

    def _roll_back(self, batch: TrainingBatch, request: RollbackRequest) -> None:
        snapshot = self._common_snapshot(batch.trainer, request.onset)
        if snapshot is None:
            self._policy.failed(batch.at.ordinal)
            why = (
                self._snapshots.unavailable or f"no snapshot from before batch {request.onset} had been proven healthy."
            )
            self.flight.store.note(
                f"AnomalyRollback wanted to go back at step {batch.at.step} ({request.reason}) and could not: {why}"
            )
            return
        same_epoch = snapshot.at.epoch == batch.at.epoch
        cleaned = restore(
            snapshot, batch.trainer, batch.module, same_epoch=same_epoch, reset_optimizer=self.reset_optimizer
        )
        self._snapshots.rewound(snapshot)
        self._policy.rolled_back(batch.at.ordinal)
        self._cut.factor *= self.lr_scale
        self._cut.install(batch.trainer.optimizers)
        self._report_rollback(batch, snapshot, request, cleaned)

    def _common_snapshot(self, trainer: Trainer, onset: int) -> Snapshot | None:
        """The newest snapshot from before the onset that all ranks hold and verified; a collective call."""
        mine = {s.at.ordinal: s for s in self._snapshots.verified(onset)}
        padded = [*mine, *[-1] * NEAR_SLOTS][:NEAR_SLOTS]
        if trainer.world_size > 1:
            gathered = trainer.strategy.all_gather(torch.tensor(padded, device=trainer.strategy.root_device))
            held = [set(row) for row in gathered.reshape(-1, NEAR_SLOTS).tolist()]
            mine = {ordinal: s for ordinal, s in mine.items() if all(ordinal in ordinals for ordinals in held)}
        return mine[max(mine)] if mine else None

    def _report_rollback(
        self, batch: TrainingBatch, snapshot: Snapshot, request: RollbackRequest, cleaned: list[str]
    ) -> None:
        trainer, count = batch.trainer, self._policy.rollbacks
        detail = {
            "from_step": batch.at.step,
            "to_step": snapshot.at.step,
            "reason": request.reason,
            "episode": request.episode,
            "steps_lost": trainer.global_step - snapshot.at.step,
            "batches_lost": batch.at.ordinal + 1 - snapshot.at.ordinal,
            "attempt": count,
            "attempts_left": self.max_rollbacks - count,
            "lr_factor": self._cut.factor,
            "optimizer_reset": self.reset_optimizer,
            "cleaned": cleaned,
        }
        self.flight.store.note(Action(action="rollback", at=batch.at, detail=detail))
        # the axis of self.log; LearningRateMonitor logs by it too
        axis = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({MARKER: float(count)}, step=axis)
        rank_zero_info(
            f"lightning_spike: rollback {count} of {self.max_rollbacks} at step {batch.at.step} ({request.reason}): "
            f"back to the weights of step {snapshot.at.step}."
        )

    def _note_spent(self, request: RollbackRequest | None) -> None:
        text = f"AnomalyRollback: all {self.max_rollbacks} rollbacks are used; the training continues without them."
        if request is not None and text not in self.flight.store.remarks:
            self.flight.store.note(text)
            warn(text)
