"""Gradient norms per parameter and in total, in one fused pass."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

NO_GRADIENT: Final = -1.0
"""Norm of a parameter without gradient; NaN would mean a NaN gradient."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientNorms:
    """The L2 norms of one set of gradients."""

    per_parameter: Tensor
    """Shape `(n,)`, float32, on the first gradient's device; `NO_GRADIENT` where there is none, Inf where a norm
    exceeds 1.8e19."""
    total: Tensor
    """Norm over all gradients, shape `()`; 0 without any."""


def gradient_norms(parameters: Sequence[Tensor]) -> GradientNorms:
    """L2 norms of the gradients of `parameters`.

    One `torch._foreach_norm` per device and dtype, as in `torch.nn.utils.get_total_norm`. The norm of a sharded
    gradient (a `DTensor`) takes a collective of all ranks. Never blocks.
    """
    with torch.no_grad():
        present = [i for i, p in enumerate(parameters) if p.grad is not None]
        if not present:
            return GradientNorms(per_parameter=torch.full((len(parameters),), NO_GRADIENT), total=torch.zeros(()))
        norms = tensor_norms([_values(parameters[i].grad) for i in present])
        missing = torch.full((), NO_GRADIENT, device=norms[0].device)
        laid_out = [missing] * len(parameters)
        for index, norm in zip(present, norms, strict=True):
            laid_out[index] = norm
        return GradientNorms(per_parameter=torch.stack(laid_out), total=torch.linalg.vector_norm(torch.stack(norms)))


def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norms of one or more floating tensors, each of shape `()`, float32, on the first one's device."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    out: dict[int, Tensor] = {}
    for (_, dtype), indices in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        # public get_total_norm has no per-tensor form
        out.update(zip(indices, torch._foreach_norm([tensors[i] for i in indices], 2, dtype=wide), strict=True))
    return [_over_shards(out[i]).to(tensors[0].device, torch.float32, non_blocking=True) for i in range(len(tensors))]


def _values(grad: Tensor | None) -> Tensor:
    if grad is None:
        msg = "a parameter lost its gradient between two reads"
        raise RuntimeError(msg)
    return grad.coalesce().values() if grad.is_sparse else grad


def _over_shards(norm: Tensor) -> Tensor:
    """The norm over all shards of a DTensor; other tensors stay as they are."""
    full = getattr(norm, "full_tensor", None)
    whole: Tensor = norm if full is None else full()
    return whole
