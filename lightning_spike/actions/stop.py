"""Decisions that all ranks take together, and the end of a training that Lightning itself carries out."""

from lightning.pytorch import Trainer

__all__ = ["decide_together", "stop_training"]


def decide_together(trainer: Trainer, *, wanted: bool) -> bool:
    """True on every rank as soon as one of them wants it.

    A collective: every rank must call it at the same place of the same batch, whatever it wants. With more than one rank it waits for the others;
    with a single process it is free.
    """
    return bool(trainer.strategy.reduce_boolean_decision(wanted, all=False))


def stop_training(trainer: Trainer, *, wanted: bool) -> bool:
    """Ask Lightning to end the training after this batch if any rank wants it, on all ranks alike; true if it was asked.

    Lightning does not share `should_stop`: set on one rank alone, the others wait for it for ever. It then finishes the batch, validates and
    saves as at any other end, and still honours `min_epochs` and `min_steps`.
    """
    stop = decide_together(trainer, wanted=wanted)
    if stop:
        trainer.should_stop = True
    return stop
