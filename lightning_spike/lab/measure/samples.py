"""The samples of the batch of the onset one by one.

Their losses, their pulls at the weights, and the gradients of those that pull hardest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_spike.experiments import SampleMeasurement
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.samples.batches import samples_in, take_samples
from lightning_spike.samples.per_sample import PerSampleLosses, held_samples_under
from lightning_spike.sandbox.isolation import Sandbox, loss_of

MAX_SAMPLES: Final = 256
"""Maximum number of samples that are run singly; engineering choice."""
MAX_HARDEST: Final = 4
"""Samples whose gradients are measured, those of the highest gradient norm bounds or losses; engineering choice."""


def measure_samples(
    sandbox: Sandbox, spike: RingEntry, ordinary: RingEntry, weights: Mapping[str, Tensor]
) -> SampleMeasurement | None:
    """Two forward and backward passes, and five of single samples.

    Where losses can only be had by slices, one for each sample of both batches.

    Args:
        sandbox: Inside `isolated`.
        spike: The batch of the onset.
        ordinary: Another one.
        weights: Healthy ones, as `copy_module` gives them.

    Returns:
        `None` where single samples cannot be told apart, or there are more than 256.
    """
    usual = _under(sandbox, weights, ordinary)
    if usual is None:
        return None
    own = _under(sandbox, weights, spike, trusting=usual.how == "tap" and usual.explains)
    if own is None:
        return None
    hardest = np.argsort(-_ranking(own))[:MAX_HARDEST].tolist()
    middle = int(np.argsort(_ranking(usual))[len(usual.losses) // 2])
    gradients = gradient_norms(sandbox, weights, spike, hardest)
    usual_gradient = float(gradient_norms(sandbox, weights, ordinary, [middle])[0])
    return SampleMeasurement(
        losses=_plain(own.losses),
        usual_losses=_plain(usual.losses),
        gradient_bounds=None if own.gradient_bounds is None else _plain(own.gradient_bounds),
        usual_gradient_bounds=None if usual.gradient_bounds is None else _plain(usual.gradient_bounds),
        hardest=tuple(hardest),
        gradients=_plain(gradients),
        usual_gradient=usual_gradient,
    )


def gradient_norms(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """The L2 norm of each single sample's gradient in eval mode; NaN for a step without a loss.

    It takes a forward and backward pass per sample and leaves every `.grad` unchanged.

    Args:
        sandbox: Inside `isolated`.
        weights: Parameters and buffers, as `copy_module` gives them.
        entry: The batch.
        positions: Positions of the samples, of which at most 256 are used.

    Returns:
        float64, shape `(len(positions),)`.
    """
    return np.array([_gradient_norm(sandbox, weights, entry, k) for k in positions[:MAX_SAMPLES]], dtype=np.float64)


def _gradient_norm(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, position: int) -> float:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    sandbox.module.eval()
    loss = loss_of(
        sandbox.step(take_samples(entry.batch, [position]), entry.at.batch_idx, random=entry.rng, at=entry.at)
    )
    parameters = [p for p in sandbox.module.parameters() if p.requires_grad]
    if loss is None or not loss.requires_grad or not parameters:
        return float("nan")
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = 0.0
    for gradient in gradients:
        if gradient is not None:
            whole += float((gradient.to_dense() if gradient.is_sparse else gradient).double().square().sum())
    return math.sqrt(whole)


def _under(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, trusting: bool = False
) -> PerSampleLosses | None:
    size = samples_in(entry.batch)
    if size is None or size > MAX_SAMPLES:
        return None
    return held_samples_under(sandbox, weights, entry, trusting=trusting)


def _ranking(found: PerSampleLosses) -> npt.NDArray[np.float64]:
    """Sorts non-finite values first."""
    values = found.losses if found.gradient_bounds is None else found.gradient_bounds
    return np.where(np.isfinite(values) & np.isfinite(found.losses), values, np.inf)


def _plain(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values.tolist())
