"""How far a stretch of bad batches goes from the onset of an episode on, and which samples are in it."""

import math
from typing import Any, Final

from lightning_spike.records import Finding, Moment
from lightning_spike.samples.examined_batch import LISTED_SAMPLES, ExaminedBatch

MANY: Final = 0.25
"""Share of a batch's samples that stand out from which the batch is bad and not a single sample, as in the cause
`label_noise` …"""
FEWEST: Final = 4
"""… and so many at least."""
WHOLE: Final = 0.5
"""Share from which all samples of the batch are named: what most of them have the others are likely to have too, only
less visibly."""
GOOD: Final = 2
"""Good batches in a row after which the stretch is over."""
LONGEST: Final = 32
"""Batches that are looked at, at most: each costs a forward and a backward pass."""


class BadBatchRun:
    """The batches from an onset on, looked at one by one under the same healthy weights until good ones come again.

    Args:
        episode: Id of the episode.
        onset: The batch that it began at, with its suspects.
    """

    def __init__(self, episode: int, onset: ExaminedBatch) -> None:
        self.episode = episode
        self.looked_at = onset.entry.at.ordinal
        """Ordinal of the newest batch seen."""
        self._bad: list[ExaminedBatch] = [onset] if onset.suspects else []
        self._seen, self._good = 1, 0

    @property
    def is_over(self) -> bool:
        """Nothing more has to be looked at."""
        return self._good >= GOOD or self._seen >= LONGEST

    def add(self, batch: ExaminedBatch) -> None:
        """Look at the next batch."""
        self.looked_at = batch.entry.at.ordinal
        self._seen += 1
        if _is_bad(batch):
            self._bad.append(batch)
            self._good = 0
        else:
            self._good += 1

    def finding(self) -> Finding | None:
        """`suspect_batches`, at the first of them.

        Keys `episode`, `ordinals`, `last_step`, `dataset_indices`, `count`, `text`; `None` where no batch was bad.
        """
        if not self._bad:
            return None
        first, last = self._bad[0].entry.at, self._bad[-1].entry.at
        named = [_named(batch) for batch in self._bad]
        known = [index for indices in named for index in indices if index is not None]
        count = sum(len(indices) for indices in named)
        detail: dict[str, Any] = {
            "episode": self.episode,
            "ordinals": [batch.entry.at.ordinal for batch in self._bad],
            "last_step": last.step,
            "dataset_indices": known[:LISTED_SAMPLES],
            "count": count,
            "text": _text(first, last, len(self._bad), count),
        }
        return Finding(detector="batch", kind="suspect_batches", at=first, detail=detail)


def _is_bad(batch: ExaminedBatch) -> bool:
    count, size = len(batch.suspects), batch.size or 0
    return count >= max(FEWEST, MANY * size) or any(math.isinf(s.score) for s in batch.suspects)


def _named(batch: ExaminedBatch) -> list[Any]:
    """Dataset indices of the samples in question, `None` where one is not known."""
    positions = [s.position for s in batch.suspects]
    if batch.size is not None and len(positions) >= max(WHOLE * batch.size, FEWEST):
        positions = list(range(batch.size))
    return [batch.index_of(position) for position in positions]


def _text(first: Moment, last: Moment, batches: int, samples: int) -> str:
    if batches == 1:
        return f"In the batch at step {first.step} {samples} sample{'s' if samples > 1 else ''} should be looked at."
    return f"From step {first.step} to {last.step} {batches} batches are bad; {samples} of their samples should be looked at."
