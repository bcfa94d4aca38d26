"""Measures low precision.

The loss of the batch in float32 where the training runs under autocast, and the loss scale before and now.
"""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_spike.experiments import LossScaleMeasurement, PrecisionMeasurement
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import copy_scaler, load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of


def measure_precision(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> PrecisionMeasurement | None:
    """Two forward passes; `None` where the training has no autocast, or gave no loss.

    Args:
        sandbox: Inside `isolated`.
        weights: Those at the onset.
        entry: The batch of the onset.
    """
    precision = str(sandbox.trainer.precision)
    if "mixed" not in precision:
        return None
    low, full = (_loss(sandbox, weights, entry, in_float32=in_float32) for in_float32 in (False, True))
    if low is None or full is None:
        return None
    return PrecisionMeasurement(precision=precision, low=low, float32=full)


def _loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, in_float32: bool) -> float | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    outputs = sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at, in_float32=in_float32)
    loss = loss_of(outputs)
    return None if loss is None else float(sandbox.ranks.mean("a loss", [float(loss.detach())])[0])


def measure_loss_scale(trainer: Trainer, saved: Mapping[str, Tensor | None] | None) -> LossScaleMeasurement | None:
    """The gradient scaler's factor in the snapshot and now; `None` without a scaler, or where it has scaled nothing yet. No pass; reads two numbers from the device.

    Args:
        trainer: The trainer, with its scaler as it was when the isolation began.
        saved: The snapshot's scaler, as `copy_scaler` gives it.
    """
    before, now = _scale(saved), _scale(copy_scaler(trainer))
    return None if before is None or now is None else LossScaleMeasurement(before=before, now=now)


def _scale(saved: Mapping[str, Tensor | None] | None) -> float | None:
    scale = None if saved is None else saved.get("scale")
    return None if scale is None else float(scale)
