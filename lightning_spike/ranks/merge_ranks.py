"""What several ranks found out together about an episode that one of them saw, in the words of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from lightning_spike.records import Action, Episode, Finding

SAME_TROUBLE: Final = 8
"""Batches between the onsets of two ranks' episodes up to which it is one trouble: each dates it back by its own noise, and one rank's batch hurts the others through the weights, in
the batch after. An engineering choice."""
OF_ONE_RANK: Final = ("modules", "samples")
"""Measurements of a single rank's batch; what else is measured is about the global batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """An episode that was examined by all ranks, or that they agreed not to examine."""

    rank: int
    """Who saw it."""
    episode: Episode
    """As that rank has it."""
    notes: tuple[Finding | Action, ...]

    def is_about(self, own: Episode) -> bool:
        """Whether another rank's episode is the same trouble."""
        return abs(own.onset.ordinal - self.episode.onset.ordinal) <= SAME_TROUBLE

    def notes_about(self, own: Episode) -> list[Finding | Action]:
        """What was found, about another rank's episode."""
        return [_about(own, note) for note in self.notes]

    @property
    def remark(self) -> str:
        """For a rank whose own loss has shown nothing of it."""
        kinds = ("split", "blame", "not_run")
        told = [note.detail for note in self.notes if isinstance(note, Finding) and note.kind in kinds]
        texts = [detail["text"] if "text" in detail else f"It was not run again: {detail['why']}." for detail in told]
        return " ".join(
            [f"Rank {self.rank} saw a {self.episode.kind} at step {self.episode.onset.step}; this rank's loss did not show it.", *texts]
        )  # fmt: skip


def merged(everybody: Sequence[Sequence[Finding]], *, by: int) -> list[Finding]:
    """The findings of the rank that saw the episode, with what is about a single rank marked as such; pure.

    Decisions were alike, so what is about the global batch is the same on all. Where a value that is not finite was born is taken from the first other rank that knows, if that one does not.

    Args:
        everybody: The findings of each rank, by rank.
        by: Who saw it.
    """
    if len(everybody) == 1:
        return list(everybody[0])
    found = [_of_rank(finding, by, len(everybody)) for finding in everybody[by]]
    if any(finding.kind == "nonfinite_origin" for finding in found):
        return found
    others = [(rank, f) for rank, told in enumerate(everybody) for f in told if f.kind == "nonfinite_origin"]
    return [*(_of_rank(f, rank, len(everybody)) for rank, f in others[:1]), *found]


def _of_rank(finding: Finding, rank: int, world: int) -> Finding:
    text = finding.detail.get("text", "")
    if finding.kind == "nonfinite_origin" or finding.detail.get("what") in OF_ONE_RANK:
        return _changed(finding, {"rank": rank, "text": f"On rank {rank}: {text}"})
    if finding.kind == "split":
        return _changed(finding, {"rank": rank, "text": f"{text} (Means over {world} ranks; rank {rank} saw it.)"})
    return finding


def _changed(finding: Finding, detail: dict[str, Any]) -> Finding:
    return dataclasses.replace(finding, detail={**finding.detail, **detail})


def _about(own: Episode, note: Finding | Action) -> Finding | Action:
    at = own.onset if isinstance(note, Finding) else note.at
    return dataclasses.replace(note, at=at, detail={**note.detail, "episode": own.id})
