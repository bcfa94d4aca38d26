"""The factor that the loss is multiplied with in half precision, before the onset and now."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_spike.record.state_copy import copy_scaler

LOWEST: Final = 1.0
"""Below 1 gradients are made smaller than they are: the scaler has halved until nothing is left of its purpose (science.md 2.2)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleMeasures:
    """Of the gradient scaler."""

    before: float
    """In the snapshot."""
    now: float
    """When the episode was examined."""
    text: str


def measure_loss_scale(trainer: Trainer, saved: Mapping[str, Tensor | None] | None) -> LossScaleMeasures | None:
    """`None` without a scaler, or where it has scaled nothing yet. No pass; reads two numbers from the device.

    Args:
        trainer: Whose scaler is read, as it was when the isolation began.
        saved: The snapshot's, as `copy_scaler` gives it.
    """
    before, now = _scale(saved), _scale(copy_scaler(trainer))
    if before is None or now is None:
        return None
    if now < LOWEST:
        told = "it is so low that gradients are made smaller than they are"
    elif now < before:
        told = "gradients have overflowed in between, and their updates were skipped"
    else:
        told = "nothing has overflowed in between" if now == before else "it has grown in between"
    return LossScaleMeasures(before=before, now=now, text=f"The loss scale was {before:g} and is {now:g}: {told}.")


def _scale(saved: Mapping[str, Tensor | None] | None) -> float | None:
    scale = None if saved is None else saved.get("scale")
    return None if scale is None else float(scale)
