"""`AnomalyRollback`: back to the last healthy snapshot, inside `fit`, when the loss does not come back by itself."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_spike.actions.lr_cut import LearningRateCut
from lightning_spike.actions.rollback_policy import RollbackPolicy, Wish
from lightning_spike.actions.stop import decide_together
from lightning_spike.arguments import number, switch, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.running_means import clean_running_means, reset_poisoned_metrics
from lightning_spike.record.snapshot import NEAR_SLOTS, Snapshot, Snapshots, refuses_snapshots
from lightning_spike.records import Action, Episode

MARKER: Final = "spike/rollback"
"""Metric that the loggers get at a rollback: how many there have been."""
TOGETHER_EVERY: Final = 8
"""On accelerators with several ranks the joint decision, which waits for the device, is taken at every 8th optimizer
step."""


class AnomalyRollback(SpikeCallback):
    """Heals a run inside `fit`.

    Restores the last verified-healthy snapshot when the loss is not finite or does not come back.

    Weights, buffers, optimizer states, loss scale and averaged models (EMA, SWA) go back; learning rates, schedulers,
    loops, random states and the loggers' step axis do not, and the training goes on with the next batches. Gradients
    are dropped, running means and metrics that have become non-finite are cleaned. Non-finite losses are a reason at
    once (under a GradScaler only if they stay, since it skips such updates itself), spikes and divergences after
    `patience` batches. Under DDP all ranks decide together and go back to the same snapshot. Loggers get
    `spike/rollback`, the report an action with what was given up.

    Each rollback in a row doubles the patience for the next and holds it off for 0, 1, 3, 7, … batches, and after
    `max_rollbacks` there are no
    more: the training then simply goes on, and the report says so.

    Args:
        patience: Batches that a spike or divergence is given to come back by itself.
        max_rollbacks: Rollbacks in the whole run, resumes included.
        lr_scale: Factor on all learning rates from each rollback on, 1.0 to leave them. It multiplies with every
            rollback, and holds under any
            scheduler: the schedule goes on as planned, the rate used at each step is the plan times the factor.
        reset_optimizer: Start with empty optimizer states (momentum, second moments) in place of the snapshot's.
        every: Batches between two snapshots: what a rollback loses at most, plus the time until trouble is noticed.
        memory_mb: Memory for all snapshots together, on the host where they are large; two must fit (12 bytes a
            parameter each under Adam).
        cooldown: Accepted losses in a row after which a rollback counts as a success and the next trouble starts anew.

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
            "AnomalyRollback(max_rollbacks)",
            max_rollbacks,
            at_least=1,
            do="Leave the callback out for no rollbacks at all.",
        )
        self.lr_scale = number(
            "AnomalyRollback(lr_scale)",
            lr_scale,
            above=0.0,
            at_most=1.0,
            do="Use 0.5 to halve the rate at each rollback.",
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
        self._wish: Wish | None = None
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
        self._policy, self._cut, self._wish, self._windows = self._new_policy(), LearningRateCut(), None, 0
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
        wish = self._policy.wish(batch.at.ordinal, changed, self.flight.store)
        if self._policy.spent:
            self._say_spent(wish)
            return
        self._wish = wish or self._wish
        if not _ends_window(batch.trainer) or not self._is_time(batch.trainer):
            return
        if decide_together(batch.trainer, wanted=self._wish is not None):
            self._go_back(batch, self._wish or Wish(reason="another_rank", onset=batch.at.ordinal, episode=None))
        self._wish = None

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
        """Every time in one process or on the CPU; counted in optimizer steps, which all ranks count alike."""
        self._windows += 1
        free = trainer.world_size == 1 or trainer.strategy.root_device.type == "cpu"
        return free or self._windows % TOGETHER_EVERY == 0

    def _go_back(self, batch: TrainingBatch, wish: Wish) -> None:
        snapshot = self._common_snapshot(batch.trainer, wish.onset)
        if snapshot is None:
            self._policy.failed(batch.at.ordinal)
            self.flight.store.note(_nothing_to_go_back_to(self._snapshots, batch, wish))
            return
        cleaned = self._restore(batch, snapshot)
        self._policy.rolled_back(batch.at.ordinal)
        self._cut.factor *= self.lr_scale
        self._cut.install(batch.trainer.optimizers)
        self._tell(batch, snapshot, wish, cleaned)

    def _restore(self, batch: TrainingBatch, snapshot: Snapshot) -> list[str]:
        trainer, module = batch.trainer, batch.module
        snapshot.load_into(trainer, module)
        if self.reset_optimizer:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        module.zero_grad(set_to_none=True)
        self._snapshots.rewound(snapshot)
        same_epoch = snapshot.at.epoch == batch.at.epoch
        return [
            *clean_running_means(trainer, snapshot.means if same_epoch else None),
            *reset_poisoned_metrics(module),
        ]

    def _common_snapshot(self, trainer: Trainer, onset: int) -> Snapshot | None:
        """The newest one from before the onset that every rank holds and believes. A collective on several ranks."""
        mine = {s.at.ordinal: s for s in self._snapshots.verified(onset)}
        padded = [*mine, *[-1] * NEAR_SLOTS][:NEAR_SLOTS]
        if trainer.world_size > 1:
            gathered = trainer.strategy.all_gather(torch.tensor(padded, device=trainer.strategy.root_device))
            held = [set(row) for row in gathered.reshape(-1, NEAR_SLOTS).tolist()]
            mine = {ordinal: s for ordinal, s in mine.items() if all(ordinal in ordinals for ordinals in held)}
        return mine[max(mine)] if mine else None

    def _tell(self, batch: TrainingBatch, snapshot: Snapshot, wish: Wish, cleaned: list[str]) -> None:
        trainer, count = batch.trainer, self._policy.rollbacks
        detail = {
            "from_step": batch.at.step,
            "to_step": snapshot.at.step,
            "reason": wish.reason,
            "episode": wish.episode,
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
            f"lightning_spike: rollback {count} of {self.max_rollbacks} at step {batch.at.step} ({wish.reason}): "
            f"back to the weights of step {snapshot.at.step}."
        )

    def _say_spent(self, wish: Wish | None) -> None:
        text = f"AnomalyRollback: all {self.max_rollbacks} rollbacks are spent; from here on the training goes on as it is."
        if wish is not None and text not in self.flight.store.remarks:
            self.flight.store.note(text)
            warn(text)


def _ends_window(trainer: Trainer) -> bool:
    """The batch has closed its accumulation window.

    Half a window's gradients would be of the course that is given up.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()  # Lightning's own test, the short last window included


def _nothing_to_go_back_to(snapshots: Snapshots, batch: TrainingBatch, wish: Wish) -> str:
    why = snapshots.unavailable or f"no snapshot from before batch {wish.onset} had been proven healthy."
    return f"AnomalyRollback wanted to go back at step {batch.at.step} ({wish.reason}) and could not: {why}"
