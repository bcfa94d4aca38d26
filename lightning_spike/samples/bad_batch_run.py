"""Extent of a run of bad batches from the onset of an episode on."""

import math
from typing import Any, Final

from lightning_spike.records import Finding, Moment
from lightning_spike.samples.examined_batch import MAX_LISTED_SAMPLES, ExaminedBatch

MIN_BAD_SHARE: Final = 0.25
"""Smallest share of outliers that makes the batch bad, as in the cause `label_noise`; engineering choice."""
MIN_BAD_SAMPLES: Final = 4
"""Smallest number of them; engineering choice."""
WHOLE_BATCH_SHARE: Final = 0.5
"""Share of outliers from which all samples are named: the others probably share the fault less visibly;
engineering choice."""
GOOD_BATCHES: Final = 2
"""Good batches in a row that end the run; engineering choice."""
MAX_BATCHES: Final = 32
"""Batches that are examined, each with a forward and a backward pass; engineering choice."""


class BadBatchRun:
    """The batches from an onset on, examined under the same healthy weights until good ones follow.

    Args:
        episode: Id of the episode.
        onset: Its first batch, with the suspects.
    """

    def __init__(self, episode: int, onset: ExaminedBatch) -> None:
        self.episode = episode
        self.last_ordinal = onset.entry.at.ordinal
        """Ordinal of the last examined batch."""
        self._bad: list[ExaminedBatch] = [onset] if onset.suspects else []
        self._seen, self._good = 1, 0

    @property
    def is_over(self) -> bool:
        """Whether no further batch has to be examined."""
        return self._good >= GOOD_BATCHES or self._seen >= MAX_BATCHES

    def add(self, batch: ExaminedBatch) -> None:
        """Add the next batch."""
        self.last_ordinal = batch.entry.at.ordinal
        self._seen += 1
        if _is_bad(batch):
            self._bad.append(batch)
            self._good = 0
        else:
            self._good += 1

    def finding(self) -> Finding | None:
        """The finding `suspect_batches` at the first of them; `None` without a bad batch.

        Its keys are `episode`, `ordinals`, `last_step`, `dataset_indices`, `count` and `text`.
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
            "dataset_indices": known[:MAX_LISTED_SAMPLES],
            "count": count,
            "text": _text(first, last, len(self._bad), count),
        }
        return Finding(detector="batch", kind="suspect_batches", at=first, detail=detail)


def _is_bad(batch: ExaminedBatch) -> bool:
    count, size = len(batch.suspects), batch.size or 0
    return count >= max(MIN_BAD_SAMPLES, MIN_BAD_SHARE * size) or any(math.isinf(s.score) for s in batch.suspects)


def _named(batch: ExaminedBatch) -> list[Any]:
    """Dataset indices of the suspects, `None` for unknown ones."""
    positions = [s.position for s in batch.suspects]
    if batch.size is not None and len(positions) >= max(WHOLE_BATCH_SHARE * batch.size, MIN_BAD_SAMPLES):
        positions = list(range(batch.size))
    return [batch.index_of(position) for position in positions]


def _text(first: Moment, last: Moment, batches: int, samples: int) -> str:
    if batches == 1:
        return f"Check {samples} sample{'s' if samples > 1 else ''} of the batch at step {first.step}."
    return f"Check {samples} samples of {batches} bad batches from step {first.step} to {last.step}."
