"""Cut a batch of any structure along its batch dimension."""

from collections import Counter, UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def samples_in(batch: object) -> int | None:
    """The number of samples in a batch; `None` where it cannot be told. Never blocks.

    It is the length that most tensors and arrays of the batch have in their first dimension; in a batch of lists only
    (one entry for each sample, as in detection) the length that all of them have. Of several lengths that are equally
    common the one met first counts.
    """
    lists = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(lists, (list, tuple)) and lists and all(isinstance(part, list) for part in lists):
        lengths = {len(part) for part in lists}
        return lengths.pop() if len(lengths) == 1 else None
    common = Counter(leaf.shape[0] for leaf in _leaves(batch) if _is_array(leaf) and leaf.ndim > 0)
    return common.most_common(1)[0][0] if common else None


def take_samples(batch: object, indices: Sequence[int], *, size: int | None = None) -> Any:
    """The same batch with these samples only, in this order.

    Tensors and arrays with `size` entries in their first dimension are indexed there, so are lists and tuples of that
    length which hold one entry for each sample; all else is kept as it is. Tensors are copied, on their device.

    Args:
        batch: Any nesting of dicts, lists, tuples, named tuples and mappings like the tokenizers' `BatchEncoding`.
        indices: Positions of the samples, in `[0, size)`.
        size: The number of samples; found by `samples_in` where it is not given.

    Raises:
        ValueError: The number of samples cannot be told.
    """
    size = samples_in(batch) if size is None else size
    if size is None:
        msg = "take_samples(batch): the batch holds no tensor, array or list whose length would tell the number of samples"
        raise ValueError(msg)
    return _take(batch, list(indices), size)


def gather_samples(batches: Sequence[object], picks: Sequence[tuple[int, int]]) -> Any | None:
    """One batch made of samples of several.

    In each place the sample at a position of one of them; all else as in the first.

    Tensors are copied, on their device. Never blocks.

    Args:
        batches: Of one structure.
        picks: For every sample of the new batch the place of a batch in `batches`, and the position in it.

    Returns:
        `None` where the batches do not fit together: another structure, other shapes of a sample (padded to another
        length), or no samples that can be told.
    """
    sizes = [samples_in(batch) for batch in batches]
    if not picks or None in sizes:
        return None
    try:
        joined = _joined(batches, [size for size in sizes if size is not None])
    except (ValueError, RuntimeError):  # what `torch.cat` and the trees say of things that do not fit
        return None
    starts = np.cumsum([0, *(size or 0 for size in sizes)])
    return take_samples(joined, [int(starts[k]) + position for k, position in picks], size=int(starts[-1]))


def _joined(batches: Sequence[object], sizes: Sequence[int]) -> object:
    """All samples of all batches in one."""

    def of_leaves(*leaves: object) -> object:
        first = leaves[0]
        if isinstance(first, UserDict):
            keys = list(first)
            return type(first)({key: _joined([leaf[key] for leaf in leaves], sizes) for key in keys})  # type: ignore[index]
        if isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == sizes[0]:
            return torch.cat(leaves)  # type: ignore[arg-type]
        if isinstance(first, np.ndarray) and first.ndim > 0 and first.shape[0] == sizes[0]:
            return np.concatenate(leaves)  # type: ignore[arg-type]
        if _is_per_sample(first, sizes[0]):
            return type(first)(item for leaf in leaves for item in leaf)  # type: ignore[attr-defined, call-arg]
        return first

    return pytree.tree_map(of_leaves, batches[0], *batches[1:], is_leaf=_per_sample_list(sizes[0]))


def _take(batch: object, indices: list[int], size: int) -> object:
    def of_leaf(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size:
            return leaf[torch.tensor(indices, device=leaf.device)]
        if isinstance(leaf, np.ndarray) and leaf.ndim > 0 and leaf.shape[0] == size:
            return leaf[indices]
        if isinstance(leaf, UserDict):
            return type(leaf)({key: _take(value, indices, size) for key, value in leaf.items()})
        if _is_per_sample(leaf, size):
            return type(leaf)(leaf[index] for index in indices)  # type: ignore[index, call-arg]
        return leaf

    return pytree.tree_map(of_leaf, batch, is_leaf=_per_sample_list(size))


def _per_sample_list(size: int) -> Callable[[object], bool]:
    return lambda node: _is_per_sample(node, size)


def _is_per_sample(node: object, size: int) -> bool:
    """A plain list or tuple with one entry a sample.

    As long as the batch, and its entries are not themselves cut along the batch.
    """
    if type(node) not in (list, tuple) or len(node) != size:  # type: ignore[arg-type]
        return False
    return not any(_is_array(leaf) and leaf.ndim > 0 and leaf.shape[0] == size for leaf in _leaves(node))


def _leaves(batch: object) -> list[Any]:
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(batch):
        leaves += _leaves(dict(leaf)) if isinstance(leaf, UserDict) else [leaf]
    return leaves


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray))
