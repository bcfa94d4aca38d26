"""A batch with some of its tensors exchanged, in the structure it came in.

What the user's dataset holds is never written to.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_spike.signals.batch import BatchLeaf, BatchPart, Path, batch_leaves


def edit_batch(batch: object, edit: Callable[[BatchLeaf], Tensor]) -> object:
    """The batch with every tensor as `edit` returns it; a leaf returned as it came stays the very same object.

    Args:
        batch: Anything that a loader yields.
        edit: Takes a tensor with its part (input, target, weight), returns a new tensor or the same.
    """
    return replaced(batch, {leaf.path: edit(leaf) for leaf in batch_leaves(batch)})


def replaced(batch: object, tensors: Mapping[Path, Tensor]) -> object:
    """The batch with other tensors at some paths.

    Containers on the way are copied, everything else is the same object.
    """
    return _rebuild(batch, (), tensors)


def leaves_of(batch: object, part: BatchPart, *, floating: bool | None = None) -> list[BatchLeaf]:
    """The tensors of one part, all or only those with (or without) a floating dtype.

    Booleans, empty and complex ones are left out.
    """
    return [
        leaf
        for leaf in batch_leaves(batch)
        if leaf.part is part
        and leaf.value.numel() > 0
        and leaf.value.dtype != torch.bool
        and not leaf.value.is_complex()
        and (floating is None or leaf.value.is_floating_point() == floating)
    ]


def number_of_samples(batch: object) -> int:
    """The length of the first dimension that most tensors share; 0 where no tensor has a dimension."""
    lengths = [leaf.value.shape[0] for leaf in batch_leaves(batch) if leaf.value.dim() > 0]
    return max(lengths, key=lengths.count, default=0)


def generator_for(seed: int, ordinal: int) -> torch.Generator:
    """A CPU generator that depends on nothing but these two, so that a resumed or repeated run draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + ordinal) % 2**63)


def some_of(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Positions of a share of `count` things, at least one.

    Int64, shape `(k,)`, drawn without repetition, in ascending order.
    """
    chosen = min(count, max(1, round(share * count)))
    return torch.randperm(count, generator=generator)[:chosen].sort().values.to(device)


def _rebuild(value: Any, path: Path, tensors: Mapping[Path, Tensor]) -> Any:
    if not any(key[: len(path)] == path for key in tensors):
        return value
    if isinstance(value, Tensor):
        return tensors.get(path, value)
    if isinstance(value, Mapping):
        return _mapping(value, {key: _rebuild(item, (*path, str(key)), tensors) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [_rebuild(item, (*path, k), tensors) for k, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    made = copy.copy(value)
    for field in dataclasses.fields(value):
        item = _rebuild(getattr(value, field.name), (*path, field.name), tensors)
        object.__setattr__(made, field.name, item)  # a frozen dataclass too
    return made


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(value) is dict:
        return items
    made: Any = copy.copy(value)
    for key, item in items.items():
        made[key] = item
    return made  # type: ignore[no-any-return]
