"""Merges the per-rank results of one examination."""

import dataclasses
from collections.abc import Sequence
from typing import Final

from lightning_spike.experiments import Experiments
from lightning_spike.records import Action, Episode

SAME_TROUBLE_BATCHES: Final = 8
"""Largest distance between the onsets of two ranks' episodes that are one trouble: each rank dates by its own noise,
and a bad batch hurts the other ranks in the batch after; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedExamination:
    """An episode that all ranks examined, or agreed not to examine."""

    rank: int
    """The rank whose loss showed it."""
    episode: Episode
    """The episode on that rank."""
    found: Experiments | None
    """`None` for no result."""
    action: Action | None = None

    def is_about(self, own: Episode) -> bool:
        """Whether this rank's episode is the same trouble."""
        return abs(own.onset.ordinal - self.episode.onset.ordinal) <= SAME_TROUBLE_BATCHES

    def notes_about(self, own: Episode) -> list[Experiments | Action]:
        """The results as notes on this rank's episode."""
        notes: list[Experiments | Action] = []
        if self.found is not None:
            notes.append(dataclasses.replace(self.found, episode=own.id))
        if self.action is not None:
            notes.append(dataclasses.replace(self.action, detail={**self.action.detail, "episode": own.id}))
        return notes


def merge_experiments(by_rank: Sequence[Experiments], *, by: int) -> Experiments:
    """Merge the experiments of all ranks: those of the rank `by`, with results of single ranks marked as such.

    Results about the global batch are the same on all ranks. The first non-finite value comes from the first rank that
    found it, beginning with `by`.

    Args:
        by_rank: The experiments.
        by: The rank whose loss showed the episode.
    """
    if len(by_rank) == 1:
        return by_rank[0]
    found = by_rank[by]
    births = [(by, found), *((rank, other) for rank, other in enumerate(by_rank) if rank != by)]
    born = next(((rank, e.first_nonfinite) for rank, e in births if e.first_nonfinite is not None), None)
    return dataclasses.replace(
        found,
        rank=by,
        world_size=len(by_rank),
        first_nonfinite=None if born is None else dataclasses.replace(born[1], rank=born[0]),
        modules=None if found.modules is None else dataclasses.replace(found.modules, rank=by),
        samples=None if found.samples is None else dataclasses.replace(found.samples, rank=by),
    )
