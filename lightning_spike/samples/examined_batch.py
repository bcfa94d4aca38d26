"""A batch of the ring, looked at sample by sample."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.samples.suspect_samples import SampleValues, Suspect
from lightning_spike.signals.batch import BatchLeaf

LISTED_SAMPLES: Final = 4096
"""Samples of a batch that are listed one by one; more are nodes or points rather than samples."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedBatch:
    """A batch of the ring, looked at sample by sample."""

    entry: RingEntry
    leaves: tuple[BatchLeaf, ...]
    size: int | None
    """Samples in the batch, `None` where it cannot be told."""
    values: Mapping[str, SampleValues]
    suspects: tuple[Suspect, ...] = ()
    losses: tuple[float, ...] | None = None
    """One a sample, `None` where they were not computed or could not be."""
    weights: str | None = None
    """Under which weights the losses were computed, in words."""

    @property
    def indices(self) -> tuple[Any, ...]:
        """Dataset indices by position, empty where they are not known."""
        return () if self.entry.ids is None else self.entry.ids.indices

    def index_of(self, position: int) -> Any:
        """Dataset index of a sample; `None` unless there is one index for every sample (a collate function may have dropped some)."""
        return self.indices[position] if len(self.indices) == self.size else None
