"""How the ranks of a DDP training go through an examination together.

What is decided by is the same on all of them, and one that fails takes the others out with it.
"""

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

ROOM: Final = 16
"""Numbers in a row; longer ones are sent in pieces. All rows are alike, so that one that says "I have failed" fits
where any other is waited for."""
HEAD: Final = 3
"""Before them: how the rank is, what is asked, and how many numbers there are."""
WELL, FAILED = 0.0, 1.0


class Agreed(CannotReplay):
    """All ranks know that they go no further here, and why."""


class OutOfReach(Agreed):
    """Another rank did not answer; nothing can be agreed with it any more."""


class Ranks:
    """What the ranks say to each other during an examination.

    In a single process nothing, and everything is as this process has it.

    Every rank must ask the same questions in the same order. They are named, so that ranks which have come to different
    places notice it and leave together, before one of them waits in a gradient's reduction for another that is
    elsewhere. Every question waits for all ranks.

    What cannot be caught: an exception on one rank alone *inside* a collective call of the training (a backward pass
    under DDP). The others wait for it there, as they would in the training, until the process group's timeout ends the
    run.

    Args:
        group: Of their own; `None` in a single process, or for a rank by itself.
    """

    def __init__(self, group: ControlGroup | None = None) -> None:
        self._group = group
        self._lost: str | None = None
        self.rank = 0 if group is None else group.rank
        self.world = 1 if group is None else group.world

    def mean(self, what: str, values: Sequence[float] | Floats) -> Floats:
        """The mean over the ranks, number by number: of losses, the loss of the global batch.

        What is not finite on one rank is not finite on any.
        """
        mine = np.asarray(values, dtype=np.float64)
        if self._group is None:
            return mine
        return np.array([mean_of(column) for column in self._table(what, mine).T], dtype=np.float64)

    def any(self, what: str, *, mine: bool) -> bool:
        """True on every rank as soon as it is on one."""
        return mine if self._group is None else bool(self._table(what, [float(mine)]).any())

    def first(self, what: str, mine: int) -> int:
        """What rank 0 has."""
        return mine if self._group is None else int(self._table(what, [mine])[0, 0])

    def meet(self, what: str, number: int = 0, *, seconds: float | None = None) -> None:
        """Go on once all are here.

        Args:
            what: Where that is …
            number: … and a number that must be the same for all.
            seconds: How long to wait for them at most.

        Raises:
            Agreed: Some are elsewhere.
        """
        if self._group is not None and np.ptp(self._table(what, [number], seconds=seconds)) > 0:
            raise _apart()

    def gather(self, mine: T) -> list[T]:
        """What each of them has, by rank."""
        self.meet("to tell all")
        return self._gather(mine)

    def tell(self, mine: T, *, by: int) -> T:
        """What one of them has."""
        self.meet("to be told", by)
        return mine if self._group is None else self._reached(lambda group: group.tell(mine, by=by))

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """A stretch that all ranks come through, or none: an exception on one of them becomes `Agreed` on all.

        In a single process it passes as it is.
        """
        try:
            yield
            if self._group is not None:
                self._table("the end of a stage", [])
        except Agreed:
            raise
        except Exception as error:
            if self._group is None:
                raise
            why = (
                str(error) if isinstance(error, CannotReplay) else f"the re-run failed: {type(error).__name__}: {error}"
            )
            self._exchange(FAILED, "", [])
            raise self._left(why) from error

    def _table(self, what: str, values: Sequence[float] | Floats, *, seconds: float | None = None) -> Floats:
        starts = range(0, max(len(values), 1), ROOM)
        return np.concatenate([self._exchange(WELL, what, values[k : k + ROOM], seconds) for k in starts], axis=1)

    def _exchange(
        self, status: float, what: str, values: Sequence[float] | Floats, seconds: float | None = None
    ) -> Floats:
        """One row of each rank, shape `(world, len(values))`; the others' are left unread where this one has failed."""
        row = np.zeros(HEAD + ROOM)
        row[:HEAD] = status, zlib.crc32(what.encode()), len(values)
        row[HEAD : HEAD + len(values)] = values
        table = self._reached(lambda group: group.send(row).table(seconds))
        if status == WELL and (table[:, 0] == FAILED).any():
            raise self._left(None)
        if status == WELL and np.ptp(table[:, 1:HEAD], axis=0).any():
            raise _apart()
        return table[:, HEAD : HEAD + len(values)]

    def _gather(self, mine: T) -> list[T]:
        return [mine] if self._group is None else self._reached(lambda group: group.gather(mine))

    def _left(self, mine: str | None) -> Agreed:
        """Why they leave, in the same words on all."""
        reasons = self._gather(mine)
        if len(set(reasons)) == 1:
            return Agreed(reasons[0])
        rank, why = next((rank, why) for rank, why in enumerate(reasons) if why is not None)
        return Agreed(f"on rank {rank}, {why}")

    def _reached(self, ask: Callable[[ControlGroup], T]) -> T:
        if self._group is None:
            msg = "a single process has nobody to ask"
            raise CannotReplay(msg)
        if self._lost is not None:  # not waited for again, where somebody goes on without an answer
            raise OutOfReach(self._lost)
        try:
            return ask(self._group)
        except RuntimeError as error:  # all that torch.distributed raises
            self._lost = f"another rank did not answer ({_first_line(error)})"
            raise OutOfReach(self._lost) from error


def mean_of(values: Iterable[float]) -> float:
    """The mean, summed up exactly, so that the order of the ranks and how many numbers are averaged together make no difference to it."""
    known = list(map(float, values))
    parts = [value / len(known) for value in known]
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)


ALONE: Final = Ranks()
"""A rank by itself."""


def _apart() -> Agreed:
    return Agreed("the ranks came to different places in the re-run: they do not hold the same weights or settings")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:100]
