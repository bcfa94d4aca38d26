"""Exchange of numbers between the ranks of a DDP training, over a separate process group on the CPU."""

import dataclasses
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
Floats = npt.NDArray[np.float64]

TIMEOUT_FACTOR: Final = 2
"""Timeout as a multiple of that of the training's process group, whose collectives fail first; engineering choice."""


@dataclasses.dataclass(slots=True)
class Exchange:
    """A running exchange of one row of numbers per rank."""

    work: Any
    gathered: list[Tensor]
    sent: Tensor
    """Held until it is sent."""

    @property
    def has_arrived(self) -> bool:
        """Whether all rows have arrived; never waits."""
        return bool(self.work.is_completed())

    def table(self, seconds: float | None = None) -> Floats:
        """The rows by rank, shape `(world_size, n)`, float64, the same on every rank. Waits for all ranks.

        Args:
            seconds: Timeout; that of the group by default.

        Raises:
            RuntimeError: A rank did not send its row in time.
        """
        self.work.wait() if seconds is None else self.work.wait(timedelta(seconds=seconds))
        return np.stack([part.numpy() for part in self.gathered])


class ControlGroup:
    """A process group (gloo, on the CPU) of all ranks, beside that of the training.

    All ranks must send over it in the same order, so each part of the suite has its own. Making one waits for all
    ranks.

    Args:
        trainer: With a DDP model, see `why_no_control_group`.
    """

    def __init__(self, trainer: Trainer) -> None:
        usual = getattr(trainer.strategy, "_timeout", None)
        timeout = usual if isinstance(usual, timedelta) else timedelta(minutes=30)
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT_FACTOR * timeout)
        self.rank: int = trainer.global_rank
        self.world: int = trainer.world_size

    @classmethod
    def of(cls, trainer: Trainer) -> Self | None:
        """A new group; `None` in a single process and where it is impossible."""
        return None if trainer.world_size == 1 or why_no_control_group(trainer) else cls(trainer)

    def send(self, row: Floats) -> Exchange:
        """Send this rank's row to all; does not wait.

        Args:
            row: Shape `(n,)`, with the same `n` on all ranks.
        """
        sent = torch.from_numpy(np.array(row, dtype=np.float64))
        gathered = [torch.empty_like(sent) for _ in range(self.world)]
        work = dist.all_gather(gathered, sent, group=self._group, async_op=True)
        return Exchange(work=work, gathered=gathered, sent=sent)

    def gather(self, thing: T) -> list[T]:
        """Gather one pickled object per rank. Waits for all."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, thing, group=self._group)
        return gathered

    def broadcast(self, thing: T, *, by: int) -> T:
        """Broadcast the pickled object of one rank. Waits for it."""
        things = [thing]
        dist.broadcast_object_list(things, src=by, group=self._group, device=torch.device("cpu"))
        return things[0]


def why_no_control_group(trainer: Trainer) -> str | None:
    """Why the ranks of this trainer cannot cooperate, as a clause; `None` where they can and in a single process.

    Only under DDP does every rank have the same whole weights.
    """
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy.model, DistributedDataParallel):
        return f"several ranks are examined under DDP only, and this is {type(trainer.strategy).__name__}"
    return None if dist.is_gloo_available() else "this build of torch has no gloo, which the ranks need"
