"""Agreement on the episode that the ranks examine next: the most severe one of all ranks."""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.ranks.control_group import ControlGroup, Exchange
from lightning_spike.ranks.rank_coordination import RankUnreachable
from lightning_spike.records import Episode

EXCHANGE_EVERY: Final = 4
"""Batches between two exchanges; a request arrives within eight batches, of the 72 that are held;
engineering choice."""
PATIENCE: Final = 300.0
"""Seconds to wait for the requests of other ranks: longer than one rank needs to write a checkpoint;
engineering choice."""

NO_REQUEST: Final = -1.0
"""Severity without a request."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminationRequest:
    """The request of one rank."""

    rank: int
    severity: float
    onset: int
    """Ordinal of the first abnormal batch."""


class ExaminationRequests:
    """Exchanges two numbers per rank, sent after every fourth batch and read four batches later, without waiting.

    Args:
        group: The ranks; other messages over it must be sent between `strongest` and the next `send`.
    """

    def __init__(self, group: ControlGroup) -> None:
        self._group = group
        self._under_way: Exchange | None = None

    def send(self, episode: Episode | None) -> None:
        """Send this rank's request, on every rank after the same batch; does not wait.

        Args:
            episode: `None` for no request.
        """
        row = [NO_REQUEST, 0.0] if episode is None else [episode.severity, episode.onset.ordinal]
        self._under_way = self._group.send(np.array(row))

    def strongest(self) -> ExaminationRequest | None:
        """The strongest of the last requests, the same on every rank; `None` without one.

        Raises:
            RankUnreachable: A rank did not send its request.
        """
        if self._under_way is None:
            return None
        try:
            table = self._under_way.table(PATIENCE)
        except RuntimeError as error:  # all that torch.distributed raises
            msg = "another rank no longer sends its requests"
            raise RankUnreachable(msg) from error
        self._under_way = None
        return strongest(table)


def strongest(table: npt.NDArray[np.float64]) -> ExaminationRequest | None:
    """The most severe request, then the one with the earliest onset, then that of the lowest rank.

    Args:
        table: Severity (-1 for no request) and onset by rank, shape `(world_size, 2)`.
    """
    requests = [
        ExaminationRequest(rank=k, severity=float(row[0]), onset=int(row[1]))
        for k, row in enumerate(table)
        if row[0] >= 0.0
    ]
    return max(requests, key=lambda request: (request.severity, -request.onset, -request.rank), default=None)
