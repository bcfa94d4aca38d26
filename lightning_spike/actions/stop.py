"""Decisions that all ranks take together, and the end of a training that Lightning itself carries out."""

import math

import torch
from lightning.pytorch import Trainer


def decide_together(trainer: Trainer, *, wanted: bool) -> bool:
    """True on every rank as soon as one of them wants it.

    A collective: every rank must call it at the same place of the same batch, whatever it wants. With more than one
    rank it waits for the others; with a single process it is free.
    """
    return bool(trainer.strategy.reduce_boolean_decision(wanted, all=False))


def stop_training(trainer: Trainer, *, wanted: bool) -> bool:
    """Ask Lightning to end the training after this batch if any rank wants it, on all ranks alike.

    True if it was asked.

    Lightning does not share `should_stop`: set on one rank alone, the others wait for it for ever. It then finishes the
    batch, validates and saves as at any other end, and still honours `min_epochs` and `min_steps`.
    """
    stop = decide_together(trainer, wanted=wanted)
    if stop:
        trainer.should_stop = True
    return stop


def mean_over_ranks(trainer: Trainer, value: float | None) -> float | None:
    """The mean of what the ranks have, `None` where none has anything.

    The same on every rank, so that they can decide alike by it.

    A collective on several ranks, which blocks; nothing in a single process.
    """
    if trainer.world_size == 1:
        return value
    mine = torch.tensor(math.nan if value is None else value, device=trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(mine).reshape(-1).tolist()
    present = [v for v in gathered if not math.isnan(v)]
    return sum(present) / len(present) if present else None
