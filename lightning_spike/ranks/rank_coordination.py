"""Joint examination by the ranks of a DDP training: equal decisions on all, and a failure of one aborts all."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_spike.errors import CannotReplay
from lightning_spike.ranks.control_group import ControlGroup

T = TypeVar("T")
Floats = npt.NDArray[np.float64]

ROW_SIZE: Final = 16
"""Numbers in a row; longer ones are sent in pieces. All rows have one size, so that a failure fits in place of any."""
HEADER_SIZE: Final = 3
"""Numbers before them: status, question and count."""
WELL, FAILED = 0.0, 1.0


class RanksAborted(CannotReplay):
    """All ranks abort the examination for this reason."""


class RankUnreachable(RanksAborted):
    """Another rank did not answer."""


class Ranks:
    """Communication of the ranks during an examination; in a single process, the values of this process.

    All ranks must ask the same questions in the same order, and each waits for all. Questions are named, so that ranks
    at different places abort together instead of waiting in different collectives.

    Cannot handle an exception on one rank *inside* a collective of the training, such as a backward pass under DDP. The
    others wait for it, as in training, until the process group's timeout.

    Args:
        group: The ranks; `None` for a single one.
    """

    def __init__(self, group: ControlGroup | None = None) -> None:
        self._group = group
        self._lost: str | None = None
        self.rank = 0 if group is None else group.rank
        self.world = 1 if group is None else group.world

    def mean(self, what: str, values: Sequence[float] | Floats) -> Floats:
        """Mean over the ranks, element by element; non-finite where one rank's value is."""
        mine = np.asarray(values, dtype=np.float64)
        if self._group is None:
            return mine
        return np.array([mean_of(column) for column in self._table(what, mine).T], dtype=np.float64)

    def any(self, what: str, *, mine: bool) -> bool:
        """Whether it is true on any rank."""
        return mine if self._group is None else bool(self._table(what, [float(mine)]).any())

    def first(self, what: str, mine: int) -> int:
        """The value of rank 0."""
        return mine if self._group is None else int(self._table(what, [mine])[0, 0])

    def barrier(self, what: str, number: int = 0, *, seconds: float | None = None) -> None:
        """Wait for all ranks.

        Args:
            what: Name of the place …
            number: … and a number that must be the same on all.
            seconds: Timeout.

        Raises:
            RanksAborted: A rank is at another place.
        """
        if self._group is not None and np.ptp(self._table(what, [number], seconds=seconds)) > 0:
            raise _apart()

    def gather(self, mine: T) -> list[T]:
        """Values of all ranks, by rank."""
        self.barrier("to tell all")
        return self._gather(mine)

    def broadcast(self, mine: T, *, by: int) -> T:
        """The value of rank `by`."""
        self.barrier("to be told", by)
        return mine if self._group is None else self._reached(lambda group: group.broadcast(mine, by=by))

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Make an exception on one rank `RanksAborted` on all; in a single process it stays as it is."""
        try:
            yield
            if self._group is not None:
                self._table("the end of a stage", [])
        except RanksAborted:
            raise
        except Exception as error:
            if self._group is None:
                raise
            name = "" if isinstance(error, CannotReplay) else f"the replay failed: {type(error).__name__}: "
            why = f"{name}{error}"
            self._exchange(FAILED, "", [])
            raise self._left(why) from error

    def _table(self, what: str, values: Sequence[float] | Floats, *, seconds: float | None = None) -> Floats:
        starts = range(0, max(len(values), 1), ROW_SIZE)
        return np.concatenate([self._exchange(WELL, what, values[k : k + ROW_SIZE], seconds) for k in starts], axis=1)

    def _exchange(
        self, status: float, what: str, values: Sequence[float] | Floats, seconds: float | None = None
    ) -> Floats:
        """Exchange one row per rank, shape `(world, len(values))`; a failed rank ignores the others' rows."""
        row = np.zeros(HEADER_SIZE + ROW_SIZE)
        row[:HEADER_SIZE] = status, zlib.crc32(what.encode()), len(values)
        row[HEADER_SIZE : HEADER_SIZE + len(values)] = values
        table = self._reached(lambda group: group.send(row).table(seconds))
        if status == WELL and (table[:, 0] == FAILED).any():
            raise self._left(None)
        if status == WELL and np.ptp(table[:, 1:HEADER_SIZE], axis=0).any():
            raise _apart()
        return table[:, HEADER_SIZE : HEADER_SIZE + len(values)]

    def _gather(self, mine: T) -> list[T]:
        return [mine] if self._group is None else self._reached(lambda group: group.gather(mine))

    def _left(self, mine: str | None) -> RanksAborted:
        """The same reason on all ranks."""
        reasons = self._gather(mine)
        if len(set(reasons)) == 1:
            return RanksAborted(reasons[0])
        rank, why = next((rank, why) for rank, why in enumerate(reasons) if why is not None)
        return RanksAborted(f"on rank {rank}, {why}")

    def _reached(self, ask: Callable[[ControlGroup], T]) -> T:
        if self._group is None:
            msg = "a single process has no other ranks"
            raise CannotReplay(msg)
        if self._lost is not None:  # do not wait again
            raise RankUnreachable(self._lost)
        try:
            return ask(self._group)
        except RuntimeError as error:  # all that torch.distributed raises
            self._lost = f"another rank did not answer ({_first_line(error)})"
            raise RankUnreachable(self._lost) from error


def mean_of(values: Iterable[float]) -> float:
    """The mean, summed exactly, so that the order of the ranks does not matter."""
    known = list(map(float, values))
    parts = [value / len(known) for value in known]
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)


SINGLE_RANK: Final = Ranks()
"""No coordination."""


def _apart() -> RanksAborted:
    return RanksAborted("the ranks reached different places in the replay: their weights or settings differ")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:100]
