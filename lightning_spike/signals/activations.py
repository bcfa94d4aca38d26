"""Size of activations, and share of units in the flat part of their function."""

import dataclasses
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_spike.signals.subset import is_readable, largest_value

FLAT_SLOPE_TWO_SIDED: Final = 0.99
"""Share of the range beyond which sigmoid and tanh are flat: their slopes are below 0.01 and 0.02;
engineering choice."""
FLAT_ONE_SIDED: Final = 0.005
"""Distance from the floor within which a smooth one-sided unit is flat: GELU below -2.9, SiLU below -7.3, softplus
below -5.3; engineering choice."""


class Shape(StrEnum):
    """Shape of a module's activation function."""

    ONE_SIDED = "one_sided"
    """Flat on one side, like ReLU; can die."""
    TWO_SIDED = "two_sided"
    """Flat on both sides, like sigmoid and tanh; can saturate."""
    OTHER = "other"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSize:
    """Size of a module's output, shape `()`, float32."""

    largest: Tensor
    """Largest absolute value, which can be NaN or Inf."""
    rms: Tensor


Flat = Callable[[nn.Module, Tensor], Tensor]


def _near_floor(_: nn.Module, out: Tensor) -> Tensor:
    return (out <= FLAT_ONE_SIDED) & (out > -FLAT_ONE_SIDED)


def _at_zero(_: nn.Module, out: Tensor) -> Tensor:
    return out <= 0


def _exactly_zero(_: nn.Module, out: Tensor) -> Tensor:
    return out == 0


def _elu(module: nn.Module, out: Tensor) -> Tensor:
    alpha = getattr(module, "alpha", 1.7580993408473766)  # SELU's alpha times its scale, torch.nn.SELU
    return out <= -alpha * FLAT_SLOPE_TWO_SIDED


def _outside(low: float, high: float) -> Flat:
    margin = (1.0 - FLAT_SLOPE_TWO_SIDED) * (high - low) / 2.0
    return lambda _, out: (out <= low + margin) | (out >= high - margin)


def _hardtanh(module: nn.Module, out: Tensor) -> Tensor:
    low, high = float(getattr(module, "min_val", -1.0)), float(getattr(module, "max_val", 1.0))
    return (out <= low) | (out >= high)


ONE_SIDED: Final[tuple[tuple[type[nn.Module], Flat], ...]] = (
    (nn.ReLU6, _at_zero),
    (nn.ReLU, _at_zero),
    (nn.ELU, _elu),
    (nn.CELU, _elu),
    (nn.SELU, _elu),
    (nn.GELU, _near_floor),
    (nn.SiLU, _near_floor),
    (nn.Mish, _near_floor),
    (nn.Softplus, _near_floor),
    (nn.Hardswish, _exactly_zero),
)
TWO_SIDED: Final[tuple[tuple[type[nn.Module], Flat], ...]] = (
    (nn.Sigmoid, _outside(0.0, 1.0)),
    (nn.Tanh, _outside(-1.0, 1.0)),
    (nn.Softsign, _outside(-1.0, 1.0)),
    (nn.Hardsigmoid, _outside(0.0, 1.0)),
    (nn.Hardtanh, _hardtanh),
    (nn.RNNBase, _outside(-1.0, 1.0)),
)


def shape_of(module: nn.Module) -> Shape:
    """The shape of a module; recurrent layers with a tanh state are two-sided."""
    if isinstance(module, nn.RNN) and module.nonlinearity == "relu":
        return Shape.OTHER
    if any(isinstance(module, kind) for kind, _ in ONE_SIDED):
        return Shape.ONE_SIDED
    return Shape.TWO_SIDED if any(isinstance(module, kind) for kind, _ in TWO_SIDED) else Shape.OTHER


def first_tensor(output: object) -> Tensor | None:
    """The first floating tensor in a module's output; `None` without one."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return next((leaf for leaf in leaves if is_readable(leaf)), None)


@torch.no_grad()
def activation_size(output: Tensor) -> ActivationSize:
    """Largest absolute value and root mean square of a non-empty floating tensor. Never blocks."""
    values = output.detach()
    rms = torch.linalg.vector_norm(values, 2, dtype=torch.float32) / math.sqrt(values.numel())
    return ActivationSize(largest=largest_value(values), rms=rms)


@torch.no_grad()
def dead_units(module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """Share of flat elements of a one-sided module, and share of units that are flat for the whole batch.

    A unit is a channel (dimension 1 of four or five) or a feature (the last dimension).

    Returns:
        Share of the elements, share of the units; shape `()`, float32. Never blocks.
    """
    values = output.detach()
    flat = next(test for kind, test in ONE_SIDED if isinstance(module, kind))(module, values)
    channel = 1 if values.dim() in {4, 5} else values.dim() - 1
    others = [d for d in range(values.dim()) if d != channel]
    shares = flat.float().mean(dim=others) if others else flat.float()
    return shares.mean(), (shares == 1.0).float().mean()


@torch.no_grad()
def saturated_share(module: nn.Module, output: Tensor) -> Tensor:
    """Share of flat elements of a two-sided module, shape `()`, float32. Never blocks."""
    test = next(test for kind, test in TWO_SIDED if isinstance(module, kind))
    return test(module, output.detach()).float().mean()
