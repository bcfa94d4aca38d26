"""Tensors of a batch of any structure: input, target or sample weight, with statistics of values and classes.

`batch_leaves` names the tensors; `value_statistics`, `class_statistics` and `weight_statistics` measure one;
`batch_signals` combines them for the recorder.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from lightning_spike.signals.subset import is_plain, is_readable

MAX_LEAVES: Final = 16
"""Tensors of a batch that are measured at every step; more are a list of samples; engineering choice."""

MAX_DEPTH: Final = 16
"""Levels of nesting, which bound a recursive structure; engineering choice."""

DISTINCT_BINS: Final = 64
"""Remainders by which classes are counted, at a fixed cost; engineering choice."""

MAX_CLASS_ELEMENTS: Final = 1 << 16
"""Elements of a counted target; more (segmentation masks, token streams) would take megabytes; engineering choice."""

TARGET_KEYS: Final = frozenset({"label", "labels", "target", "targets", "y"})
WEIGHT_KEYS: Final = frozenset({"weight", "weights", "sample_weight", "sample_weights"})

Key = str | int
Path = tuple[Key, ...]


class BatchPart(StrEnum):
    """Role of a tensor of the batch; signal names begin with the value."""

    INPUT = "input"
    TARGET = "target"
    WEIGHT = "weight"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchRoles:
    """Roles in a batch that differ from the convention."""

    target: str | None = None
    """Path of the target in the batch, keys and positions joined by dots (`"labels"`, `"1"`, `"views.0.y"`), everything
    below it included."""
    weight: str | None = None
    """Path of the sample weights."""
    input: str | None = None
    """Path of the input; other tensors (ids, masks) are then ignored."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchLeaf:
    """One tensor of a batch."""

    name: str
    """Name in signals: `"input"`, `"target"`, `"weight"`, or with a path where it is ambiguous, `"input.image"`."""
    path: Path
    """Keys and positions from the batch down to the tensor."""
    part: BatchPart
    value: Tensor


@dataclasses.dataclass(slots=True)
class _Found:
    path: Path
    value: Tensor
    in_mappings: Path
    """The longest prefix of `path` that is a mapping or an object with named fields, `()` for none but the root."""
    part: BatchPart | None


def children(value: object) -> list[tuple[Key, object]] | None:
    """The items of a mapping, tuple, list or dataclass by key, position or field name; `None` for anything else."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def batch_leaves(batch: object, roles: BatchRoles | None = None) -> tuple[BatchLeaf, ...]:
    """The tensors of a batch in order, each with its part.

    By convention the last tensor of a tuple or list is the target and the rest is input (a single tensor is input); in
    a mapping or a dataclass `label(s)`, `target(s)` and `y` are the target, `weight(s)` and `sample_weight(s)` the
    sample weights, and the rest is input. In a mapping of tuples (several loaders) each tuple follows the convention.
    Other objects are ignored.

    Args:
        batch: Any output of a loader.
        roles: Paths that override the convention.
    """
    found = list(_walk(batch, (), (), None, MAX_DEPTH))
    _mark_last_as_target(batch, found)
    roles = roles or BatchRoles()
    for item in found:
        item.part = _overridden(item.path, roles) or item.part
        if roles.target is not None and item.part is BatchPart.TARGET and not _is_under(item.path, roles.target):
            item.part = BatchPart.INPUT
    if roles.input is not None:
        inputs = (None, BatchPart.INPUT)
        found = [item for item in found if item.part not in inputs or _is_under(item.path, roles.input)]
    return tuple(_named(found))


def batch_signals(batch: object, roles: BatchRoles | None = None) -> dict[str, Tensor]:
    """The statistics of the first `MAX_LEAVES` tensors by signal name, `batch/<leaf>/<statistic>`. Never blocks.

    `value_statistics` of every floating tensor, with `weight_statistics` for sample weights; `class_statistics` of an
    integer target or input (tokens).

    Returns:
        Tensors of shape `()`, but for `histogram`, of shape `(64,)`.
    """
    return {
        f"batch/{leaf.name}/{statistic}": value
        for leaf in batch_leaves(batch, roles)[:MAX_LEAVES]
        for statistic, value in _statistics(leaf).items()
    }


def value_statistics(tensor: Tensor) -> dict[str, Tensor]:
    """Statistics of the finite values of a floating tensor.

    Returns:
        `mean`, `std` (of the population), `max_abs`, `nonfinite` (number of NaN and ±Inf) and `zeros` (share); each of
        shape `()`, float32 or wider. Mean and std are NaN without a finite element. Sums are of values divided by the
        largest, so that no finite tensor overflows. Empty unless `is_readable`. Never blocks, draws no random numbers.
    """
    if not is_readable(tensor):
        return {}
    with torch.no_grad():
        wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.element_size() > 1 else torch.float32
        values = tensor.detach().to(wide)
        finite = values.isfinite()
        count = finite.sum()
        kept = torch.where(finite, values, 0.0)
        largest = kept.abs().amax()
        scale = largest.clamp_min(torch.finfo(values.dtype).tiny)
        unit = kept / scale
        mean = unit.sum() / count
        spread = torch.where(finite, unit - mean, 0.0).square().sum().div(count).sqrt()
        zeros = (values == 0).sum() / values.numel()
        nonfinite = (values.numel() - count).to(values.dtype)
        return {
            "mean": mean * scale,
            "std": spread * scale,
            "max_abs": largest,
            "nonfinite": nonfinite,
            "zeros": zeros.to(values.dtype),
        }


def class_statistics(tensor: Tensor) -> dict[str, Tensor]:
    """Distribution of the classes of an integer target, or the tokens of an input, by their remainders modulo 64.

    Compares with every remainder: `unique` and `bincount` wait for the device, and scattering is not deterministic.

    Returns:
        `distinct`: number of remainders that occur; `entropy`: of their shares, in nats; `largest`: share of the most
        frequent; `longest_run`: equal elements in a row, in row-major order; each of shape `()`; `histogram`: counts of
        the remainders, shape `(64,)`; all float32. Empty for other dtypes, booleans, and more than 65,536 elements.
        Never blocks.
    """
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    if not is_plain(tensor) or not is_integer or not 0 < tensor.numel() <= MAX_CLASS_ELEMENTS:
        return {}
    with torch.no_grad():
        values = tensor.detach().reshape(-1)
        bins = _places(DISTINCT_BINS, tensor.device)
        counts = (values.unsqueeze(1).remainder(DISTINCT_BINS) == bins).sum(dim=0, dtype=torch.float32)
        shares = counts / values.numel()
        return {
            "distinct": counts.sign().sum(),
            "entropy": torch.special.entr(shares).sum(),
            "largest": shares.amax(),
            "longest_run": _longest_run(values),
            "histogram": counts,
        }


def weight_statistics(tensor: Tensor) -> dict[str, Tensor]:
    """Effective sample size and largest share of the sample weights of a batch.

    Returns:
        `ess`: (sum w)² / sum w² (Kish) as a share of their number, 1 for equal weights; `max_share`: the largest
        weight's share of the sum of absolute weights; shape `()`, float32 or wider, NaN where all are 0. Empty unless
        `is_readable`. Never blocks.
    """
    if not is_readable(tensor):
        return {}
    with torch.no_grad():
        weights = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        unit = weights / weights.abs().amax()
        return {
            "ess": unit.sum().square() / (unit.square().sum() * weights.numel()),
            "max_share": 1.0 / unit.abs().sum(),
        }


def _longest_run(values: Tensor) -> Tensor:
    """Length of the longest run of equal values."""
    if values.numel() == 1:
        return torch.ones((), device=values.device)
    place = _places(values.numel() - 1, values.device) + 1.0
    begins = place * (values[1:] != values[:-1])
    return (place - begins.cummax(dim=0).values).amax() + 1.0


@functools.lru_cache(maxsize=32)
def _places(count: int, device: torch.device) -> Tensor:
    """0, 1, … as a tensor, cached by length and device."""
    return torch.arange(count, device=device)


def _statistics(leaf: BatchLeaf) -> dict[str, Tensor]:
    if leaf.part is not BatchPart.WEIGHT and (classes := class_statistics(leaf.value)):
        return classes
    values = value_statistics(leaf.value)
    return values | weight_statistics(leaf.value) if leaf.part is BatchPart.WEIGHT else values


def _walk(value: object, path: Path, in_mappings: Path, part: BatchPart | None, depth: int) -> Iterator[_Found]:
    if isinstance(value, Tensor):
        yield _Found(path, value, in_mappings, part)
        return
    held = children(value) if depth else None
    if held is None:
        return
    named = not isinstance(value, (list, tuple))
    for key, item in held:
        below = (_part_of_key(key) or part) if named else part
        yield from _walk(item, (*path, key), path if named else in_mappings, below, depth - 1)


def _part_of_key(key: Key) -> BatchPart | None:
    if not isinstance(key, str):
        return None
    lowered = key.lower()
    if lowered in TARGET_KEYS:
        return BatchPart.TARGET
    return BatchPart.WEIGHT if lowered in WEIGHT_KEYS else None


def _mark_last_as_target(batch: object, found: Sequence[_Found]) -> None:
    """Apply the convention of tuples to the batch, or to each value of a mapping without a named target."""
    if isinstance(batch, (list, tuple)):
        _mark_last(found, 0)
    elif all(item.part is None for item in found):
        for key, item in children(batch) or []:
            if isinstance(item, (list, tuple)):
                _mark_last([f for f in found if f.path[0] == key], 1)


def _mark_last(found: Sequence[_Found], level: int) -> None:
    """Mark the last item of a tuple at a nesting level, with all tensors of a mapping there, as target."""
    if len(found) < 2 or any(f.part is BatchPart.TARGET for f in found):  # noqa: PLR2004 - a single tensor is input
        return
    last = found[-1]
    mapping = last.path[: level + 1] if len(last.in_mappings) > level else last.path
    for item in found:
        if item.part is None and item.path[: len(mapping)] == mapping:
            item.part = BatchPart.TARGET


def _overridden(path: Path, roles: BatchRoles) -> BatchPart | None:
    if roles.target is not None and _is_under(path, roles.target):
        return BatchPart.TARGET
    return BatchPart.WEIGHT if roles.weight is not None and _is_under(path, roles.weight) else None


def _is_under(path: Path, where: str) -> bool:
    joined = _joined(path)
    return joined == where or joined.startswith(f"{where}.")


def _joined(path: Path) -> str:
    return ".".join(map(str, path))


def _named(found: Sequence[_Found]) -> Iterator[BatchLeaf]:
    """Name each tensor by its part, and by its path where the part is ambiguous."""
    parts = [item.part or BatchPart.INPUT for item in found]
    for item, part in zip(found, parts, strict=True):
        alone = parts.count(part) == 1 and not any(isinstance(key, str) for key in item.path)
        name = part.value if alone else f"{part}.{_joined(item.path)}"
        yield BatchLeaf(name=name, path=item.path, part=part, value=item.value)
