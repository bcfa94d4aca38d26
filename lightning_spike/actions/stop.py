"""Decisions of all ranks, and a stop of the training by Lightning."""

import math

import torch
from lightning.pytorch import Trainer


def decide_together(trainer: Trainer, *, wanted: bool) -> bool:
    """Whether any rank wants it. A collective that all ranks must call at the same place of the same batch."""
    return bool(trainer.strategy.reduce_boolean_decision(wanted, all=False))


def stop_training(trainer: Trainer, *, wanted: bool) -> bool:
    """Stop the training after this batch on all ranks if any wants it; returns whether.

    A collective, as Lightning does not share `should_stop` and other ranks would wait forever. Lightning finishes the
    batch, validates, saves, and respects `min_epochs` and `min_steps`.
    """
    stop = decide_together(trainer, wanted=wanted)
    if stop:
        trainer.should_stop = True
    return stop


def mean_over_ranks(trainer: Trainer, value: float | None) -> float | None:
    """The mean over the ranks that have a value; `None` if none has. A blocking collective on several ranks."""
    if trainer.world_size == 1:
        return value
    mine = torch.tensor(math.nan if value is None else value, device=trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(mine).reshape(-1).tolist()
    present = [v for v in gathered if not math.isnan(v)]
    return sum(present) / len(present) if present else None
