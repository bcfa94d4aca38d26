"""Some numbers between the ranks of a DDP training, over a process group of their own on the CPU.

No device is read or waited for.
"""

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

LONGER: Final = 2
"""Times the timeout of the training's own process group after which a rank that waits for another gives up: what the
other is caught in fails first."""


@dataclasses.dataclass(slots=True)
class Exchange:
    """A row of numbers of every rank, on its way to all of them."""

    work: Any
    gathered: list[Tensor]
    sent: Tensor
    """Kept alive until it has been sent."""

    @property
    def has_arrived(self) -> bool:
        """Whether all ranks' rows are there; never waits."""
        return bool(self.work.is_completed())

    def table(self, seconds: float | None = None) -> Floats:
        """The rows by rank, shape `(world_size, n)`, float64; the same on every rank.

        Waits for ranks that have not sent theirs.

        Args:
            seconds: How long to wait at most; as long as the group itself does where it is not given.

        Raises:
            RuntimeError: A rank is gone, or did not send its row in time.
        """
        self.work.wait() if seconds is None else self.work.wait(timedelta(seconds=seconds))
        return np.stack([part.numpy() for part in self.gathered])


class ControlGroup:
    """A process group (gloo, on the CPU) of all ranks, beside that of the training.

    Everything that is sent over one group must be sent by all ranks in the same order; so each part of the suite that
    exchanges something has a group of its own. Making one waits for all ranks.

    Args:
        trainer: With a DDP model, see `why_no_control_group`.
    """

    def __init__(self, trainer: Trainer) -> None:
        usual = getattr(trainer.strategy, "_timeout", None)
        timeout = usual if isinstance(usual, timedelta) else timedelta(minutes=30)
        self._group: Any = dist.new_group(backend="gloo", timeout=LONGER * timeout)
        self.rank: int = trainer.global_rank
        self.world: int = trainer.world_size

    @classmethod
    def of(cls, trainer: Trainer) -> Self | None:
        """A new group; `None` in a single process, and where there can be none."""
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
        """What each rank has, by rank; pickled on the way. Waits for all."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, thing, group=self._group)
        return gathered

    def tell(self, thing: T, *, by: int) -> T:
        """What one rank has, on all; pickled on the way. Waits for it."""
        told = [thing]
        dist.broadcast_object_list(told, src=by, group=self._group, device=torch.device("cpu"))
        return told[0]


def why_no_control_group(trainer: Trainer) -> str | None:
    """Why the ranks of this trainer cannot be compared, or do something together, as a clause; `None` where they can, and in a single process.

    Under DDP every rank has whole weights and the same ones; other strategies shard them, or have no ranks that could
    be spoken to.
    """
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy.model, DistributedDataParallel):
        return f"several ranks are looked at together under DDP only, and this is {type(trainer.strategy).__name__}"
    return None if dist.is_gloo_available() else "this build of torch has no gloo, by which the ranks would agree"
