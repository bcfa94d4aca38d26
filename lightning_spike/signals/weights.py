"""Size of weights, length of updates, and initial scale relative to the fan-in."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from lightning_spike.signals.gradients import tensor_norms
from lightning_spike.signals.subset import largest_value, subset

EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """Size of a set of weights."""

    norms: Tensor
    """L2 norm of each, shape `(n,)`, float32."""
    largest: Tensor
    """Largest absolute value of each, shape `(n,)`, float32."""
    total: Tensor
    """L2 norm of all together, shape `()`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Displacement:
    """Length of an update of a set of weights."""

    norms: Tensor
    """L2 norm of each one's change, shape `(n,)`, float32."""
    total: Tensor
    """L2 norm of the change of all together, shape `()`."""


@torch.no_grad()
def weight_sizes(weights: Sequence[Tensor]) -> WeightSizes:
    """Norms and largest values of one or more non-empty weights, on the first one's device. Never blocks."""
    norms = torch.stack(tensor_norms([w.detach() for w in weights]))
    largest = torch.stack([largest_value(w).to(norms.device, non_blocking=True) for w in weights])
    return WeightSizes(norms=norms, largest=largest, total=torch.linalg.vector_norm(norms))


@torch.no_grad()
def displacement(before: Sequence[Tensor], after: Sequence[Tensor]) -> Displacement:
    """The change of each weight, of a large one estimated from a subset.

    Args:
        before: Copies of `subset(weight)` for each weight.
        after: The weights now.

    Returns:
        Norms on the first weight's device, scaled up for weights beyond `subset.MAX_ELEMENTS`. Never blocks.
    """
    changes = [subset(now) - then for then, now in zip(before, after, strict=True)]
    scales = [math.sqrt(now.numel() / then.numel()) for then, now in zip(before, after, strict=True)]
    norms = torch.stack([norm * scale for norm, scale in zip(tensor_norms(changes), scales, strict=True)])
    return Displacement(norms=norms, total=torch.linalg.vector_norm(norms))


def fan_scale(module: nn.Module, name: str, weight: Tensor) -> float | None:
    """Reference scale of a weight, 1 / sqrt(fan-in), or 1 for an embedding; `None` without a known fan-in.

    The usual initialisations lie around it: torch's own default for linear layers, convolutions and recurrent ones at
    0.58 (uniform in ±1 / sqrt(fan), recurrent ones with the number of hidden units for the fan), Xavier at up to 1.4,
    He at 1.4 (`torch.nn.init`), the largest gain of `calculate_gain`, 5/3, on top of them at 2.4.

    Args:
        module: The module that holds the weight directly.
        name: The weight's name in it.
        weight: The weight.
    """
    if weight.dim() < 2:  # noqa: PLR2004 - a vector has no fan-in
        return None
    if isinstance(module, EMBEDDINGS):
        return 1.0
    if isinstance(module, nn.RNNBase):
        return 1.0 / math.sqrt(module.hidden_size)
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return None
    known = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and name == "weight"
    if known or (isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight")):
        return 1.0 / math.sqrt(weight[0].numel())
    return None


@torch.no_grad()
def initial_scales(weights: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Root mean square of each weight over its `fan_scale`; shape `(n,)`, float32. Never blocks."""
    sizes = zip(tensor_norms([w.detach() for w in weights]), weights, scales, strict=True)
    return torch.stack([norm / (math.sqrt(weight.numel()) * scale) for norm, weight, scale in sizes])
