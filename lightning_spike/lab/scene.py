"""All that the examination of one episode works with: live objects to run on, and records of what the run did."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningModule, Trainer

from lightning_spike.errors import OnsetGone
from lightning_spike.experiments import OutsideWrite
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.snapshot import Snapshot
from lightning_spike.record.update_settings import Settings
from lightning_spike.records import Episode

NOISE_WINDOW = 64
"""Losses before the onset that give the noise of normal batches; engineering choice."""


MIN_RISE_RATIO = 2.0
"""Rise of the next batch over the onset's from which the next one is explained; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """One episode, with what is needed to run it again.

    Made live by `CounterfactualReplay`, or read from disk in another process.
    """

    trainer: Trainer
    """Between two batches, with its optimizers set up."""
    module: LightningModule
    episode: Episode
    snapshot: Snapshot
    """The newest from before the onset that has proven healthy."""
    entries: tuple[RingEntry, ...]
    """Every batch that is held, oldest first: some from before the snapshot (to compare with), all from the snapshot to
    the present, none left out."""
    settings: Mapping[int, Sequence[Settings]]
    """Settings of the optimizer steps, by the ordinal of their batch."""
    losses: Mapping[int, float]
    """The recorded training losses by ordinal, from `2 * NOISE_WINDOW` batches before the onset; means over ranks."""
    controls: int
    """Ordinary batches to compare with, at most."""
    writes: tuple[OutsideWrite, ...] = ()
    """Writes to weights and optimizer states outside the training step, oldest first."""
    modes: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """By the ordinal of the batch from which on, the names of the modules that were in eval mode; an entry for each
    change."""
    looks_at: int | None = None
    """Ordinal of the batch whose loss is to be explained; `None` for the one that the losses themselves point to."""
    ranks: Ranks = SINGLE_RANK
    """Those that examine it together; each has a scene that differs from the others' in its own batches only."""

    @property
    def onset(self) -> int:
        """Ordinal of the first abnormal batch."""
        return self.episode.onset.ordinal

    @property
    def target_ordinal(self) -> int:
        """Ordinal of the batch whose loss is to be explained.

        The onset's, or the next where that one's rose by more than twice as much.

        A loss that was merely somewhat high just before a jump may have been taken for its onset.
        """
        if self.looks_at is not None:
            return self.looks_at
        following, before = self.losses.get(self.onset + 1), self.losses_before()
        before = before[np.isfinite(before)]
        if following is None or before.size == 0 or not math.isfinite(self.losses[self.onset]):
            return self.onset
        values = np.array([float(np.median(before)), self.losses[self.onset], following])
        usual, first, second = log_scale(values)(values)
        return self.onset + 1 if second - usual > MIN_RISE_RATIO * max(first - usual, 0.0) else self.onset

    def elsewhere(self) -> "Scene | None":
        """The same episode, explained at the highest later loss; `None` if there is no later one."""
        target_ordinal = self.target_ordinal
        later = [e.at.ordinal for e in self.entries if e.at.ordinal > target_ordinal and e.at.ordinal in self.losses]
        if not later:
            return None
        return dataclasses.replace(self, looks_at=max(later, key=lambda ordinal: self.losses[ordinal]))

    @property
    def spike(self) -> RingEntry:
        """The target batch."""
        target_ordinal = self.target_ordinal
        return next(entry for entry in self.entries if entry.at.ordinal == target_ordinal)

    @property
    def recorded(self) -> float:
        """The loss of that batch in the training."""
        return self.losses[self.target_ordinal]

    @property
    def stretch(self) -> tuple[RingEntry, ...]:
        """The batches from the snapshot's to that one, both included."""
        first, last = self.snapshot.at.ordinal, self.target_ordinal
        return tuple(e for e in self.entries if first <= e.at.ordinal <= last)

    @property
    def after(self) -> tuple[RingEntry, ...]:
        """The batches from that one to the present one, both included."""
        target_ordinal = self.target_ordinal
        return tuple(e for e in self.entries if e.at.ordinal >= target_ordinal)

    def losses_before(self) -> npt.NDArray[np.float64]:
        """The last `NOISE_WINDOW` losses before the onset, oldest first, as far as they are known; float64."""
        known = (self.losses.get(k) for k in range(self.onset - NOISE_WINDOW, self.onset))
        return np.array([loss for loss in known if loss is not None], dtype=np.float64)

    def ordinary(self) -> list[RingEntry]:
        """The control batches: the newest from before the snapshot, then those between snapshot and onset.

        Raises:
            OnsetGone: No normal batch is recorded.
        """
        start = self.snapshot.at.ordinal
        held = [e for e in self.entries if e.at.ordinal < self.onset and self._is_usable(e)]
        seen = [e for e in held if e.at.ordinal < start][::-1]
        later = [e for e in held if e.at.ordinal >= start]
        chosen = [*seen, *later][: self.controls]
        if not chosen:
            msg = "no ordinary batch from before the onset is held, to compare with"
            raise OnsetGone(msg)
        return chosen

    def _is_usable(self, entry: RingEntry) -> bool:
        return not entry.mutated and math.isfinite(self.losses.get(entry.at.ordinal, math.nan))
