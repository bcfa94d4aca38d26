"""A batch of the ring, examined sample by sample."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.samples.suspect_samples import SampleValues, Suspect
from lightning_spike.signals.batch import BatchLeaf

MAX_LISTED_SAMPLES: Final = 4096
"""Samples of a batch that are listed; more are nodes or points rather than samples; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedBatch:
    """A batch of the ring, examined sample by sample."""

    entry: RingEntry
    leaves: tuple[BatchLeaf, ...]
    size: int | None
    """Samples in the batch; `None` where unknown."""
    values: Mapping[str, SampleValues]
    suspects: tuple[Suspect, ...] = ()
    losses: tuple[float, ...] | None = None
    """One per sample; `None` where unknown."""
    weights: str | None = None
    """The weights of these losses, in words."""

    @property
    def indices(self) -> tuple[Any, ...]:
        """Dataset indices by position; empty where unknown."""
        return () if self.entry.ids is None else self.entry.ids.indices

    def index_of(self, position: int) -> Any:
        """Dataset index of a sample; `None` unless every sample has one (a collate function can drop some)."""
        return self.indices[position] if len(self.indices) == self.size else None
