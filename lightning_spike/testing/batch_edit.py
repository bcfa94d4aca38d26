"""Replaces tensors in a batch of any structure; the user's own objects are never written to."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_spike.signals.batch import BatchLeaf, BatchPart, Path, batch_leaves

T = TypeVar("T")


def edit_batch(batch: object, edit: Callable[[BatchLeaf], Tensor]) -> object:
    """Returns the batch with every tensor replaced by `edit` of it; an unchanged leaf stays the same object.

    Args:
        batch: Anything that a loader yields.
        edit: Takes a tensor with its part (input, target, weight), returns a new tensor or the same.
    """
    return replaced(batch, {leaf.path: edit(leaf) for leaf in batch_leaves(batch)})


def replaced(batch: object, tensors: Mapping[Path, Tensor]) -> object:
    """Returns the batch with other tensors at some paths; containers above them are copied."""
    return _rebuild(batch, (), tensors)


def leaves_of(batch: object, part: BatchPart, *, floating: bool | None = None) -> list[BatchLeaf]:
    """The tensors of one part, optionally of floating or of integer dtype; no boolean, complex or empty ones."""
    return [
        leaf
        for leaf in batch_leaves(batch)
        if leaf.part is part
        and leaf.value.numel() > 0
        and leaf.value.dtype != torch.bool
        and not leaf.value.is_complex()
        and (floating is None or leaf.value.is_floating_point() == floating)
    ]


def token_leaves(batch: object) -> list[BatchLeaf]:
    """The integer inputs, then integer targets of the same shape (language modelling); empty without inputs."""
    inputs = leaves_of(batch, BatchPart.INPUT, floating=False)
    shapes = {leaf.value.shape for leaf in inputs if leaf.value.dim() > 1}
    targets = leaves_of(batch, BatchPart.TARGET, floating=False)
    return [*inputs, *(leaf for leaf in targets if leaf.value.shape in shapes)]


def number_of_samples(batch: object) -> int:
    """The most common length of the first dimension; 0 if no tensor has a dimension."""
    lengths = [leaf.value.shape[0] for leaf in batch_leaves(batch) if leaf.value.dim() > 0]
    return max(lengths, key=lengths.count, default=0)


def generator_for(seed: int, ordinal: int) -> torch.Generator:
    """Returns a CPU generator seeded by both numbers only, so a resumed or repeated run draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + ordinal) % 2**63)


def some_of(count: int, share: float, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draws a share of `count` positions, at least one: int64, shape `(k,)`, ascending, without repetition."""
    chosen = min(count, max(1, round(share * count)))
    return torch.randperm(count, generator=generator)[:chosen].sort().values.to(device)


def some_items(items: Sequence[T], share: float, seed: int) -> list[T]:
    """Draws a share of some items, at least one, in their order."""
    return [items[k] for k in some_of(len(items), share, generator_for(seed, 0)).tolist()]


@torch.no_grad()
def add_noise(module: nn.Module, amount: float, generator: torch.Generator) -> None:
    """Adds noise of `amount` times its root mean square to every parameter."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * parameter.square().mean().sqrt() * amount)


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
    made.update(items)
    return made  # type: ignore[no-any-return]
