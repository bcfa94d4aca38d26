"""Merges the per-rank results of one examination."""

import dataclasses
from collections.abc import Sequence
from typing import Final

from lightning_spike.experiments import Experiments
from lightning_spike.records import Action, Episode

SAME_TROUBLE_BATCHES: Final = 8
"""Batches between the onsets of two ranks' episodes up to which it is one trouble: each dates it back by its own noise,
and one rank's batch hurts the others through the weights, in the batch after; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedExamination:
    """An episode that was examined by all ranks, or that they agreed not to examine."""

    rank: int
    """Whose loss showed it."""
    episode: Episode
    """As that rank has it."""
    found: Experiments | None
    """`None` where nothing is to be noted."""
    action: Action | None = None

    def is_about(self, own: Episode) -> bool:
        """Whether another rank's episode is the same trouble."""
        return abs(own.onset.ordinal - self.episode.onset.ordinal) <= SAME_TROUBLE_BATCHES

    def notes_about(self, own: Episode) -> list[Experiments | Action]:
        """What was found, about another rank's episode."""
        notes: list[Experiments | Action] = []
        if self.found is not None:
            notes.append(dataclasses.replace(self.found, episode=own.id))
        if self.action is not None:
            notes.append(dataclasses.replace(self.action, detail={**self.action.detail, "episode": own.id}))
        return notes


def merged(everybody: Sequence[Experiments], *, by: int) -> Experiments:
    """The experiments of the rank whose loss showed the episode, with what is about a single rank marked as such; pure.

    Decisions were alike, so what is about the global batch is the same on all. Where the first non-finite value appears
    is taken from the first other rank that knows, if that one does not.

    Args:
        everybody: The experiments of each rank, by rank.
        by: The rank whose loss showed it.
    """
    if len(everybody) == 1:
        return everybody[0]
    found = everybody[by]
    births = [(by, found), *((rank, other) for rank, other in enumerate(everybody) if rank != by)]
    born = next(((rank, e.first_nonfinite) for rank, e in births if e.first_nonfinite is not None), None)
    return dataclasses.replace(
        found,
        rank=by,
        world_size=len(everybody),
        first_nonfinite=None if born is None else dataclasses.replace(born[1], rank=born[0]),
        modules=None if found.modules is None else dataclasses.replace(found.modules, rank=by),
        samples=None if found.samples is None else dataclasses.replace(found.samples, rank=by),
    )
