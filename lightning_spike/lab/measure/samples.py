"""The samples of the batch of the onset one by one: their losses, their pulls at the weights, and the gradients of those that pull hardest."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.samples.batches import samples_in, take_samples
from lightning_spike.samples.per_sample import PerSampleLosses, held_samples_under
from lightning_spike.sandbox.isolation import Sandbox, loss_of

MOST: Final = 256
"""Samples that are run one by one at most."""
CLOSER: Final = 4
"""Samples whose gradients are taken, those that pull hardest (or have the highest losses); on a small network each costs nearly as much as a batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleMeasures:
    """Under healthy weights, in eval mode."""

    losses: tuple[float, ...]
    """By position in the batch of the onset."""
    pulls: tuple[float, ...] | None
    """How large the gradient of each sample can be, see `sample_pulls`; `None` where no layer could be watched."""
    usual_losses: tuple[float, ...]
    """Of the samples of an ordinary batch."""
    usual_pulls: tuple[float, ...] | None
    closer: tuple[int, ...]
    """Positions of the few that pull hardest, what is not finite first …"""
    gradients: tuple[float, ...]
    """… and the L2 norm of the gradient that each of them has by itself."""
    usual_gradient: float
    """The same of the ordinary batch's sample in the middle."""
    text: str


def measure_samples(
    sandbox: Sandbox, spike: RingEntry, ordinary: RingEntry, weights: Mapping[str, Tensor]
) -> SampleMeasures | None:
    """Two forward and backward passes, and five of single samples; where losses can only be had by slices, one for each sample of both batches.

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
    hardest = np.argsort(-_ranking(own))[:CLOSER].tolist()
    middle = int(np.argsort(_ranking(usual))[len(usual.losses) // 2])
    gradients = gradient_norms(sandbox, weights, spike, hardest)
    usual_gradient = float(gradient_norms(sandbox, weights, ordinary, [middle])[0])
    found = SampleMeasures(
        losses=_plain(own.losses),
        pulls=None if own.pulls is None else _plain(own.pulls),
        usual_losses=_plain(usual.losses),
        usual_pulls=None if usual.pulls is None else _plain(usual.pulls),
        closer=tuple(hardest),
        gradients=_plain(gradients),
        usual_gradient=usual_gradient,
        text="",
    )
    return dataclasses.replace(found, text=_text(found))


def gradient_norms(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """The L2 norm of the gradient that each of these samples has by itself, in eval mode (BatchNorm by its running statistics); NaN where a step gives no loss.

    One forward and backward pass of one sample each. No `.grad` is touched.

    Args:
        sandbox: Inside `isolated`.
        weights: Parameters and buffers, as `copy_module` gives them.
        entry: The batch.
        positions: Of the samples; at most 256 are looked at.

    Returns:
        float64, shape `(len(positions),)`.
    """
    return np.array([_gradient_norm(sandbox, weights, entry, k) for k in positions[:MOST]], dtype=np.float64)


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
    if size is None or size > MOST:
        return None
    return held_samples_under(sandbox, weights, entry, trusting=trusting)


def _ranking(found: PerSampleLosses) -> npt.NDArray[np.float64]:
    """What is not finite comes first."""
    values = found.losses if found.pulls is None else found.pulls
    return np.where(np.isfinite(values) & np.isfinite(found.losses), values, np.inf)


def _plain(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values.tolist())


def _text(found: SampleMeasures) -> str:
    middle, usual = np.nanmedian(found.losses), np.nanmedian(found.usual_losses)
    worst = int(np.argmax(np.where(np.isfinite(found.losses), found.losses, np.inf)))
    pairs = zip(found.closer, found.gradients, strict=True)
    hardest, gradient = max(pairs, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    return (
        f"Under healthy weights the samples' losses have a median of {middle:.3g} (an ordinary batch's {usual:.3g}), the highest is {found.losses[worst]:.3g} at position {worst}; "
        f"the sample at position {hardest} has a gradient of norm {gradient:.3g}, an ordinary one {found.usual_gradient:.3g}."
    )
