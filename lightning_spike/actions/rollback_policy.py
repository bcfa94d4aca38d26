"""Decides when to roll back, without endless repetition."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.records import Episode, EpisodeKind, Recovery, StepRow
from lightning_spike.store import TrainerStateStore

TRANSIENT_KINDS: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Kinds whose episodes change with every bad batch."""
LEVEL_BATCHES: Final = 16
"""Batches whose median is the present level of a diverging loss, as `BLOCK` in `detectors.series`."""
MAX_REMAINING_SHARE: Final = 0.25
"""Share of a divergence's rise up to which it has recovered, as in the slow detector; engineering choice."""
MAX_OVERFLOWS: Final = 4
"""Non-finite losses in a row that a GradScaler handles by skipped updates; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequest:
    """A reason for a rollback."""

    reason: str
    """`"nonfinite"`, `"spike"`, `"divergence"`, or `"another_rank"`."""
    onset: int
    """Ordinal of the first bad batch; the snapshot must precede it."""
    episode: int | None


class RollbackPolicy:
    """Decides by the episodes, with a patience that doubles with every rollback in a row.

    A non-finite loss is a reason at once, a spike or divergence after `patience` batches without recovery. After the
    n-th rollback in a row, without `cooldown` accepted losses in between, the patience is 2^n times as long, and the
    next 2^(n-1) - 1 batches are no reason, even non-finite ones. So the run passes bad data, and a fault of the run
    uses up the budget slowly. dlib's trainer does likewise (`dnn/trainer.h`), except for NaN.

    Args:
        patience: Batches in which a finite loss can recover.
        max_rollbacks: Largest number of rollbacks in the run.
        cooldown: Accepted losses in a row that reset the patience.
    """

    def __init__(self, *, patience: int, max_rollbacks: int, cooldown: int) -> None:
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.cooldown = cooldown
        self.rollbacks = 0
        """Number of rollbacks so far."""
        self.level = 0
        """Number of rollbacks in a row."""
        self.tolerated = 1
        """Non-finite losses in a row that are a reason."""
        self._last = -1
        """Last batch that was undone."""
        self._newest = -1
        self._calm = 0
        self._bad: list[int] = []

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.rollbacks >= self.max_rollbacks

    def under_scaler(self) -> None:
        """Tolerate single non-finite losses, whose updates a GradScaler skips."""
        self.tolerated = MAX_OVERFLOWS

    def judge(self, row: StepRow, *, healthy: bool) -> None:
        """Add the numbers of a batch; ignores those that were undone."""
        self._newest = row.at.ordinal
        if self._newest <= self._last:
            return
        self._bad = [*self._bad, self._newest][-1000:] if _is_nonfinite(row) else []
        self._calm = self._calm + 1 if healthy else 0
        if self._calm >= self.cooldown:
            self.level = 0

    def request(self, now: int, changed: Sequence[Episode], store: TrainerStateStore) -> RollbackRequest | None:
        """The reason for a rollback at the end of batch `now`; `None` without one.

        Args:
            now: Ordinal of the last batch.
            changed: New or changed episodes.
            store: Has the open episodes and recent losses.
        """
        hold = (1 << max(self.level - 1, 0)) - 1
        if now <= self._last + hold:
            return None
        if len(self._bad) >= self.tolerated:
            return self._nonfinite(store.episodes)
        kinds = {*TRANSIENT_KINDS, EpisodeKind.DIVERGENCE}
        lasting = [e for e in changed if e.kind in TRANSIENT_KINDS and _is_open(e)]  # one more bad loss
        lasting += [e for e in store.episodes if e.kind is EpisodeKind.DIVERGENCE and self._is_raised(e, store)]
        lasting += [e for e in changed if e.kind in kinds and e.recovery is Recovery.NEVER]
        judged = {"loss"} if "loss" in store.history.signals else set(store.history.signals)
        first = next((e for e in lasting if e.signal in judged and self._patience_is_over(e)), None)
        return (
            None
            if first is None
            else RollbackRequest(reason=str(first.kind), onset=first.onset.ordinal, episode=first.id)
        )

    def rolled_back(self, now: int) -> None:
        """Note a rollback at the end of batch `now`."""
        self.rollbacks += 1
        self.failed(now)

    def failed(self, now: int) -> None:
        """Note that there was no snapshot at the end of batch `now`; costs no budget."""
        self.level += 1
        self._last, self._calm, self._bad = now, 0, []

    def _nonfinite(self, episodes: Sequence[Episode]) -> RollbackRequest:
        first = self._bad[0]
        episode = next((e for e in reversed(episodes) if _is_open(e) and e.kind is not EpisodeKind.OVERFIT), None)
        onset = first if episode is None else min(first, episode.onset.ordinal)
        return RollbackRequest(
            reason=str(EpisodeKind.NONFINITE), onset=onset, episode=None if episode is None else episode.id
        )

    def _patience_is_over(self, episode: Episode) -> bool:
        since = max(episode.onset.ordinal, self._last + 1)
        return self._newest - since >= self.patience << self.level

    def _is_raised(self, episode: Episode, store: TrainerStateStore) -> bool:
        """Whether the level of a divergence, which the detector absorbs, has not recovered."""
        if not _is_open(episode) or episode.loss_before is None or episode.loss_peak is None:
            return False
        recent = store.history.between(
            episode.signal, max(self._newest - LEVEL_BATCHES + 1, self._last + 1), self._newest
        )
        recent = recent[np.isfinite(recent)]
        bound = episode.loss_before + MAX_REMAINING_SHARE * (episode.loss_peak - episode.loss_before)
        return recent.size > 0 and bool(np.median(recent) > bound)


def _is_open(episode: Episode) -> bool:
    return episode.end is None and episode.recovery is Recovery.OPEN


def _is_nonfinite(row: StepRow) -> bool:
    """Whether the training loss, or one of several, is non-finite; further values can be NaN by design."""
    if "loss" in row.values:
        return not math.isfinite(row.values["loss"])
    return any(not math.isfinite(v) for name, v in row.values.items() if name.startswith("loss/"))
