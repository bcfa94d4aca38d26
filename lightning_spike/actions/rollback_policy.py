"""When to go back: plain numbers in, a wish or none out, and never so often that it goes round in circles."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.records import Episode, EpisodeKind, Recovery, StepRow
from lightning_spike.store import TrainerStateStore

WAITS_FOR: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Kinds that are seen to go on batch by batch; a non-finite loss itself is not waited for."""
SETTLED: Final = 16
"""Batches whose median is the present level of a diverging loss: the block length of the slow detector."""
LEFT: Final = 0.25
"""Share of a divergence's rise up to which it has come back, as in the slow detector."""
OVERFLOWS: Final = 4
"""Non-finite losses in a row that a GradScaler is given to deal with: it skips those updates and halves the scale each
time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A reason to go back."""

    reason: str
    """`"nonfinite"`, `"spike"`, `"divergence"`, or `"another_rank"` where this rank has seen nothing itself."""
    onset: int
    """Ordinal of the first batch in trouble: only a snapshot from before it will do."""
    episode: int | None


class RollbackPolicy:
    """Decides from the episodes, row by row, with a threshold that hardens with every rollback in a row.

    A non-finite loss is a reason at once; a spike or divergence is one when it has not come back within `patience`
    batches. After the n-th rollback without a calm stretch of `cooldown` batches since the one before, the patience is
    2^n times as long and nothing at all, a non-finite loss included, is a reason for the next 2^(n-1) - 1 batches: a
    stretch of poisonous data is passed by, and trouble that comes from the run itself uses up its budget slowly. dlib's
    trainer hardens likewise (`dnn/trainer.h`), but not for NaN, where it can go round for ever.

    Args:
        patience: Batches that a finite trouble is given.
        max_rollbacks: Rollbacks in the whole run.
        cooldown: Accepted losses in a row after which the threshold is back at its start.
    """

    def __init__(self, *, patience: int, max_rollbacks: int, cooldown: int) -> None:
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.cooldown = cooldown
        self.rollbacks = 0
        """Rollbacks so far, in the whole run."""
        self.level = 0
        """Rollbacks in a row: without a calm stretch between them."""
        self.tolerated = 1
        """Non-finite losses in a row that make a reason."""
        self._last = -1
        """Batches up to this one belong to a course that was given up."""
        self._newest = -1
        self._calm = 0
        self._bad: list[int] = []

    @property
    def spent(self) -> bool:
        """The budget is used up: there will be no more rollback in this run."""
        return self.rollbacks >= self.max_rollbacks

    def under_scaler(self) -> None:
        """A GradScaler skips updates that overflow: only a loss that stays non-finite is a reason."""
        self.tolerated = OVERFLOWS

    def judge(self, row: StepRow, *, healthy: bool) -> None:
        """Take in a batch that has arrived.

        Those from before the last rollback say nothing about the run as it is now.
        """
        self._newest = row.at.ordinal
        if self._newest <= self._last:
            return
        self._bad = [*self._bad, self._newest][-1000:] if _is_nonfinite(row) else []
        self._calm = self._calm + 1 if healthy else 0
        if self._calm >= self.cooldown:
            self.level = 0

    def wish(self, now: int, changed: Sequence[Episode], store: TrainerStateStore) -> Wish | None:
        """The reason to go back at the end of batch `now`, `None` where there is none.

        Args:
            now: Ordinal of the batch that has just ended.
            changed: The episodes that the newest rows have opened or changed.
            store: For the open episodes and the recent losses.
        """
        hold = (1 << max(self.level - 1, 0)) - 1
        if now <= self._last + hold:
            return None
        if len(self._bad) >= self.tolerated:
            return self._nonfinite(store.episodes)
        lasting = [
            e for e in changed if e.kind in WAITS_FOR and _is_open(e)
        ]  # changed, while open: by one more loss outside
        lasting += [e for e in store.episodes if e.kind is EpisodeKind.DIVERGENCE and self._still_up(e, store)]
        lasting += [
            e for e in changed if e.recovery is Recovery.NEVER and e.kind in {*WAITS_FOR, EpisodeKind.DIVERGENCE}
        ]
        judged = {"loss"} if "loss" in store.history.signals else set(store.history.signals)
        first = next((e for e in lasting if e.signal in judged and self._patience_is_over(e)), None)
        return None if first is None else Wish(reason=str(first.kind), onset=first.onset.ordinal, episode=first.id)

    def rolled_back(self, now: int) -> None:
        """A rollback was done at the end of batch `now`."""
        self.rollbacks += 1
        self.failed(now)

    def failed(self, now: int) -> None:
        """There was nothing to go back to at the end of batch `now`.

        Costs no budget, but is not tried again at once either.
        """
        self.level += 1
        self._last, self._calm, self._bad = now, 0, []

    def _nonfinite(self, episodes: Sequence[Episode]) -> Wish:
        first = self._bad[0]
        episode = next((e for e in reversed(episodes) if _is_open(e) and e.kind is not EpisodeKind.OVERFIT), None)
        onset = first if episode is None else min(first, episode.onset.ordinal)
        return Wish(reason=str(EpisodeKind.NONFINITE), onset=onset, episode=None if episode is None else episode.id)

    def _patience_is_over(self, episode: Episode) -> bool:
        since = max(episode.onset.ordinal, self._last + 1)
        return self._newest - since >= self.patience << self.level

    def _still_up(self, episode: Episode, store: TrainerStateStore) -> bool:
        """A divergence is taken up as the new normal by the detector; so the level itself is looked at."""
        if not _is_open(episode) or episode.loss_before is None or episode.loss_peak is None:
            return False
        recent = store.history.between(episode.signal, max(self._newest - SETTLED + 1, self._last + 1), self._newest)
        recent = recent[np.isfinite(recent)]
        bound = episode.loss_before + LEFT * (episode.loss_peak - episode.loss_before)
        return recent.size > 0 and bool(np.median(recent) > bound)


def _is_open(episode: Episode) -> bool:
    return episode.end is None and episode.recovery is Recovery.OPEN


def _is_nonfinite(row: StepRow) -> bool:
    """By the training loss; by any of several where there is no single one.

    A further value that a step returns may well be NaN by design.
    """
    if "loss" in row.values:
        return not math.isfinite(row.values["loss"])
    return any(not math.isfinite(v) for name, v in row.values.items() if name.startswith("loss/"))
