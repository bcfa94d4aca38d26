"""The training losses as they were recorded, one number a batch."""

from collections.abc import Iterable

from lightning_spike.signals.loss import total_loss
from lightning_spike.store import History

__all__ = ["recorded_losses"]


def recorded_losses(history: History, ordinals: Iterable[int]) -> dict[int, float]:
    """The loss of each of these batches; the sum where a batch has several under manual optimisation. Batches without one are left out."""
    signals = [name for name in history.signals if name == "loss" or name.startswith("loss/")]
    losses: dict[int, float] = {}
    for ordinal in ordinals:
        named = {name: value for name in signals if (value := history.at(name, ordinal)) is not None}
        if (total := total_loss(named)) is not None:
            losses[ordinal] = total
    return losses
