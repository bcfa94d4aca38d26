"""Cut a batch of any structure along its batch dimension."""

from collections import Counter, UserDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def samples_in(batch: object) -> int | None:
    """The number of samples in a batch; `None` where it is unknown. Never blocks.

    It is the most common length of the first dimension of its tensors and arrays, or the common length of a batch of
    lists (one entry per sample, as in detection).
    """
    lists = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(lists, (list, tuple)) and lists and all(isinstance(part, list) for part in lists):
        lengths = {len(part) for part in lists}
        return lengths.pop() if len(lengths) == 1 else None
    arrays = [leaf for leaf in _leaves(batch) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0]
    common = Counter(leaf.shape[0] for leaf in arrays)
    return common.most_common(1)[0][0] if common else None


def take_samples(batch: object, indices: Sequence[int], *, size: int | None = None) -> Any:
    """Select samples of a batch, in this order.

    Indexes tensors and arrays with `size` entries in their first dimension, and lists and tuples of that length with
    one entry per sample. Everything else stays as it is. Copies tensors on their device.

    Args:
        batch: Any nesting of dicts, lists, tuples, named tuples and mappings like the tokenizers' `BatchEncoding`.
        indices: Positions of the samples, in `[0, size)`.
        size: The number of samples; by `samples_in` if not given.

    Raises:
        ValueError: The number of samples is unknown.
    """
    size = samples_in(batch) if size is None else size
    if size is None:
        msg = "take_samples(batch): no tensor, array or list of the batch gives the number of samples"
        raise ValueError(msg)
    return _take(batch, list(indices), size)


def gather_samples(batches: Sequence[object], picks: Sequence[tuple[int, int]]) -> Any | None:
    """Join samples of several batches into one; everything else is as in the first batch.

    Copies tensors on their device. Never blocks.

    Args:
        batches: Of one structure.
        picks: For every sample of the new batch, the index in `batches` and the position in that batch.

    Returns:
        `None` where the batches do not fit together: other structures, other shapes of a sample (padding), or an
        unknown number of samples.
    """
    sizes = [samples_in(batch) for batch in batches]
    if not picks or None in sizes:
        return None
    try:
        joined = _joined(batches, [size for size in sizes if size is not None])
    except (ValueError, RuntimeError):  # from `torch.cat` and the trees
        return None
    starts = np.cumsum([0, *(size or 0 for size in sizes)])
    return take_samples(joined, [int(starts[k]) + position for k, position in picks], size=int(starts[-1]))


def _joined(batches: Sequence[object], sizes: Sequence[int]) -> object:
    """All samples of all batches in one."""

    def of_leaves(*leaves: object) -> object:
        first = leaves[0]
        if isinstance(first, UserDict):
            mappings = cast("tuple[UserDict[Any, Any], ...]", leaves)
            return type(first)({key: _joined([mapping[key] for mapping in mappings], sizes) for key in first})
        if isinstance(first, Tensor) and _is_batched(first, sizes[0]):
            return torch.cat(leaves)  # type: ignore[arg-type]
        if _is_batched(first, sizes[0]):
            return np.concatenate(leaves)  # type: ignore[arg-type]
        if _is_per_sample(first, sizes[0]):
            return type(first)(item for leaf in leaves for item in leaf)  # type: ignore[attr-defined, call-arg]
        return first

    return pytree.tree_map(of_leaves, batches[0], *batches[1:], is_leaf=lambda node: _is_per_sample(node, sizes[0]))


def _take(batch: object, indices: list[int], size: int) -> object:
    def of_leaf(leaf: object) -> object:
        if isinstance(leaf, Tensor) and _is_batched(leaf, size):
            return leaf[torch.tensor(indices, device=leaf.device)]
        if isinstance(leaf, np.ndarray) and _is_batched(leaf, size):
            return leaf[indices]
        if isinstance(leaf, UserDict):
            return type(leaf)({key: _take(value, indices, size) for key, value in leaf.items()})
        if _is_per_sample(leaf, size):
            return type(leaf)(leaf[index] for index in indices)  # type: ignore[index, call-arg]
        return leaf

    return pytree.tree_map(of_leaf, batch, is_leaf=lambda node: _is_per_sample(node, size))


def _is_per_sample(node: object, size: int) -> bool:
    """Whether a node is a plain list or tuple of one entry per sample, not of tensors along the batch."""
    if type(node) not in (list, tuple) or len(node) != size:  # type: ignore[arg-type]
        return False
    return not any(_is_batched(leaf, size) for leaf in _leaves(node))


def _leaves(batch: object) -> list[Any]:
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(batch):
        leaves += _leaves(dict(leaf)) if isinstance(leaf, UserDict) else [leaf]
    return leaves


def _is_batched(leaf: object, size: int) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 and leaf.shape[0] == size
