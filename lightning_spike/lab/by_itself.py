"""`training_step` without a word to other ranks, so that one rank can run it while the others do something else."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.surroundings import Places, standing_in

__all__ = ["by_itself"]

EXCHANGES: Final = ("all_gather", "all_reduce", "reduce", "reduce_boolean_decision", "broadcast", "barrier")
"""Methods of Lightning's strategies that wait for other ranks."""


@contextlib.contextmanager
def by_itself(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Make SyncBatchNorm normalise by this rank's batch alone, and refuse what else Lightning would exchange; nothing in a single process.

    What the step sends through `torch.distributed` itself is not seen.

    Args:
        trainer: Of the run.
        module: Whose step is run inside.
    """
    if trainer.world_size == 1:
        yield
        return
    synced = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)]
    strategy: Any = trainer.strategy
    places: Places = [
        *((vars(part), {"forward": functools.partial(_BatchNorm.forward, part)}) for part in synced),
        (vars(strategy), {name: functools.partial(_refuse, name) for name in EXCHANGES if hasattr(strategy, name)}),
    ]
    with standing_in(places):
        yield


def _refuse(name: str, *_: object, **__: object) -> NoReturn:
    msg = f"training_step exchanges something with the other ranks ({name}), and cannot be run on one alone"
    raise CannotReplay(msg)
