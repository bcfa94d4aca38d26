"""Which episode the ranks examine next.

Each says what it has seen, and the strongest wish wins on all of them at the same batch.
"""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.ranks.control_group import ControlGroup, Exchange
from lightning_spike.ranks.rank_coordination import OutOfReach
from lightning_spike.records import Episode

EVERY: Final = 4
"""Batches from one exchange to the next: a wish is heard four to eight batches after it came up, of the 72 that are
held."""
PATIENCE: Final = 300.0
"""Seconds that a rank waits for the others' wishes before it gives them up: longer than the writing of a checkpoint,
which may be one rank's work, and short enough for a part of ours that broke on one rank to cost no more than that,
once."""

NONE: Final = -1.0
"""Stands for the severity where a rank wants nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminationRequest:
    """What one rank would like to be examined."""

    rank: int
    severity: float
    onset: int
    """Ordinal of the first abnormal batch."""


class ExaminationRequests:
    """Two numbers from every rank to all, sent after every fourth batch and read after the next fourth.

    By then they are there: nobody waits for anybody but for a rank that is four batches behind, which under DDP none
    can be but on a GPU's queue.

    Args:
        group: Of the ranks; what else goes over it must be sent between `strongest` and the next `send`.
    """

    def __init__(self, group: ControlGroup) -> None:
        self._group = group
        self._under_way: Exchange | None = None

    def send(self, episode: Episode | None) -> None:
        """Say what this rank would like to be examined; does not wait. On every rank after the same batch.

        Args:
            episode: `None` for nothing.
        """
        row = [NONE, 0.0] if episode is None else [episode.severity, episode.onset.ordinal]
        self._under_way = self._group.send(np.array(row))

    def strongest(self) -> ExaminationRequest | None:
        """The strongest of the wishes that were last sent, the same on every rank; `None` where there is none.

        Raises:
            OutOfReach: A rank did not send its own.
        """
        if self._under_way is None:
            return None
        try:
            table = self._under_way.table(PATIENCE)
        except RuntimeError as error:  # all that torch.distributed raises
            msg = "another rank does not say any more what it has seen"
            raise OutOfReach(msg) from error
        self._under_way = None
        return strongest(table)


def strongest(table: npt.NDArray[np.float64]) -> ExaminationRequest | None:
    """The most severe, of several the one with the earliest onset, of several the lowest rank's; pure.

    Args:
        table: Severity (-1 for no wish) and onset by rank; shape `(world_size, 2)`.
    """
    wishes = [
        ExaminationRequest(rank=k, severity=float(row[0]), onset=int(row[1]))
        for k, row in enumerate(table)
        if row[0] >= 0.0
    ]
    return max(wishes, key=lambda wish: (wish.severity, -wish.onset, -wish.rank), default=None)
