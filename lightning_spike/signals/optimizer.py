"""State of an optimizer against its next gradient: stale second moments, momentum in another direction."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_spike.signals.gradients import tensor_norms
from lightning_spike.signals.subset import is_readable, subset

SECOND_MOMENTS: Final[Mapping[str, str]] = {"exp_avg_sq": "betas", "square_avg": "alpha"}
"""Optimizer state of averaged squared gradients (Adam, RMSprop), and the setting of its decay."""
MOMENTA: Final = ("exp_avg", "momentum_buffer")
NEAR_EPS: Final = 10.0
"""Multiple of eps below which eps dominates a root of a second moment (Wortsman et al. 2023, small-scale proxies)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Optimizer state of one parameter with a gradient."""

    parameter: Tensor
    second: Tensor | None
    """Average of squared gradients; `None` without one."""
    momentum: Tensor | None
    decay: float | Tensor
    """Decay of `second`: Adam's beta2, RMSprop's alpha."""
    steps: float | Tensor | None
    """Number of updates for Adam's bias correction; `None` without it."""
    eps: float
    sign: float
    """-1 where the optimizer maximises."""


def memories(optimizer: Optimizer) -> Iterator[Memory]:
    """The state of each parameter with a plain gradient, in the order of the groups. Never blocks."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and parameter.grad is not None and is_readable(parameter.grad):
                yield _memory(parameter, state, group)


@torch.no_grad()
def corrected_roots(held: Sequence[Memory]) -> list[Tensor]:
    """Roots of the second moments with Adam's bias correction, on a subset, float32. Never blocks."""
    roots = []
    for memory in held:
        if memory.second is None:
            msg = "a memory without a second moment has no root"
            raise ValueError(msg)
        second = subset(memory.second).float()
        known = 1.0 if memory.steps is None else (1.0 - memory.decay**memory.steps)
        roots.append((second / known).sqrt_())
    return roots


@torch.no_grad()
def update_rms(gradients: Sequence[Tensor], roots: Sequence[Tensor], eps: Sequence[float]) -> Tensor:
    """RMS_t = sqrt(mean(g² / max(v, eps²))), v from before the update (Wortsman et al. 2023, StableAdamW).

    About 1 for a gradient as expected by the second moment, at least 2.3 some steps before many spikes.

    Args:
        gradients: As the optimizer used them, one or more.
        roots: From `corrected_roots` before the update.
        eps: Of each tensor.

    Returns:
        Shape `(n,)`, float32, on the first gradient's device. Never blocks.
    """
    ratios = [
        subset(gradient).float() / root.clamp_min(floor)
        for gradient, root, floor in zip(gradients, roots, eps, strict=True)
    ]
    norms = tensor_norms(ratios)
    return torch.stack([norm / math.sqrt(ratio.numel()) for norm, ratio in zip(norms, ratios, strict=True)])


@torch.no_grad()
def eps_shares(roots: Sequence[Tensor], eps: Sequence[float]) -> Tensor:
    """Share of the coordinates of each tensor with a root below 10 eps; shape `(n,)`, float32. Never blocks."""
    device = roots[0].device
    shares = [(root < NEAR_EPS * floor).float().mean() for root, floor in zip(roots, eps, strict=True)]
    return torch.stack([share.to(device, non_blocking=True) for share in shares])


@torch.no_grad()
def momentum_cosine(held: Sequence[Memory]) -> Tensor:
    """Cosine between gradients and momenta before the update, over all parameters; shape `()`. Never blocks.

    Args:
        held: One or more, each with a momentum; of large tensors a scaled subset is used.
    """
    dots, gradients, momenta = [], [], []
    for memory in held:
        if memory.momentum is None or memory.parameter.grad is None:
            msg = "a memory without momentum or gradient has no cosine"
            raise ValueError(msg)
        gradient, momentum = subset(memory.parameter.grad).float(), subset(memory.momentum).float()
        scale = math.sqrt(memory.parameter.numel() / gradient.numel())
        dots.append(torch.dot(gradient, momentum) * (memory.sign * scale**2))
        gradients.append(gradient * scale if scale > 1.0 else gradient)
        momenta.append(momentum * scale if scale > 1.0 else momentum)
    dot = torch.stack([d.to(dots[0].device, non_blocking=True) for d in dots]).sum()
    norms = [torch.linalg.vector_norm(torch.stack(tensor_norms(side))) for side in (gradients, momenta)]
    cosine: Tensor = dot / (norms[0] * norms[1]).clamp_min(torch.finfo(torch.float32).tiny)
    return cosine


def _memory(parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Memory:
    name = next((n for n in SECOND_MOMENTS if _plain(state.get(n), parameter)), None)
    momentum = next((state[n] for n in MOMENTA if _plain(state.get(n), parameter)), None)
    decay: float | Tensor = 0.0
    if name is not None:
        setting = group.get(SECOND_MOMENTS[name], 0.0)
        decay = setting[1] if name == "exp_avg_sq" and isinstance(setting, (tuple, list)) else setting
    eps = group.get("eps", 0.0)
    return Memory(
        parameter=parameter,
        second=None if name is None else state.get("max_exp_avg_sq", state[name]),
        momentum=momentum,
        decay=decay,
        steps=state.get("step") if name == "exp_avg_sq" else None,
        eps=eps if isinstance(eps, float) else 0.0,
        sign=-1.0 if group.get("maximize") else 1.0,
    )


def _plain(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and is_readable(value)
