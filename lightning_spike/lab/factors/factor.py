"""What a factor is: one thing about an update that can be put back to normal, with all else as it was."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.lab.reproduce import Leg
from lightning_spike.lab.update import Settings, Update

__all__ = ["Around", "Factor"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Around:
    """What was normal around the update in question."""

    legs: Sequence[Leg]
    """The updates that were made again, oldest first, up to the one in question, which is the last."""
    controls: Sequence[RingEntry]
    """Ordinary batches, the most ordinary one first."""
    settings: Sequence[Settings]
    """Of the optimizer steps before, of the same optimizer, oldest first; at most 32 steps back."""
    defaults: Mapping[str, Any]
    """The optimizer's hyperparameters as its class has them where the user gives none."""
    is_mixed: bool
    """Whether the training runs under autocast."""
    named: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    """By the ordinal of a batch, the positions of its samples that stand out, where that was looked into."""

    @property
    def oldest(self) -> Leg:
        """The first of the updates that were made again."""
        return self.legs[0]


class Factor(ABC):
    """One thing about an update.

    Its normal value is what it recently was, not what would be safer: with a tenth of the learning rate the damage goes away whatever made it
    (75 of 75, science.md 2b.6). What was normal already is no factor: then `normal` is `None`, and no run is spent on it.
    """

    id: ClassVar[str]
    """As in the finding, and as causes name it."""
    group: ClassVar[str]
    """`"data"`, `"learning_rate"`, `"optimizer"`, `"clipping"` or `"numerics"`: who is to blame if it was this."""
    title: ClassVar[str]
    """For a sentence: "the batch"."""

    @abstractmethod
    def normal(self, update: Update, around: Around) -> Update | None:
        """The update with this factor at its recent normal value, all else as given; `None` where it was normal."""
