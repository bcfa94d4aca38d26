"""What is in a batch, whatever its structure.

Which tensor is input, target or sample weight, how large its values are, how its classes and weights are spread.

`batch_leaves` names the tensors, `value_statistics`, `class_statistics` and `weight_statistics` measure one,
`batch_signals` does it all for the recorder.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

MAX_LEAVES: Final = 16
"""Tensors of a batch that are measured at every step; more are a list of single samples, whose statistics would cost
more than they tell."""

MAX_DEPTH: Final = 16
"""Levels of nesting that are looked into; a structure that holds itself ends here."""

DISTINCT_BINS: Final = 64
"""Bins that class numbers are hashed into, by their remainder, at a cost that does not depend on the values."""

MAX_DISTINCT_VALUES: Final = 1 << 16
"""Targets with more elements (segmentation masks, token streams) are not counted: the comparison with all bins would
take megabytes."""

TARGET_KEYS: Final = frozenset({"label", "labels", "target", "targets", "y"})
WEIGHT_KEYS: Final = frozenset({"weight", "weights", "sample_weight", "sample_weights"})

Key = str | int
Path = tuple[Key, ...]


class BatchPart(StrEnum):
    """What a tensor of the batch is for; the values begin the names of its signals."""

    INPUT = "input"
    TARGET = "target"
    WEIGHT = "weight"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchRoles:
    """Which part of a batch is what, where the convention does not fit."""

    target: str | None = None
    """Path of the target in the batch, keys and positions joined by dots (`"labels"`, `"1"`, `"views.0.y"`), everything
    below it included."""
    weight: str | None = None
    """Path of the sample weights."""
    input: str | None = None
    """Path of the input; what is then none of the three (ids, masks) is passed over."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchLeaf:
    """One tensor of a batch."""

    name: str
    """As in signal names: `"input"`, `"target"`, `"weight"`, or with the path where several tensors or keys need
    telling apart: `"input.image"`."""
    path: Path
    """Keys and positions from the batch down to the tensor."""
    part: BatchPart
    value: Tensor


@dataclasses.dataclass(slots=True)
class _Found:
    path: Path
    value: Tensor
    in_mappings: Path
    """The longest beginning of `path` at which a mapping (or an object with named fields) stands, `()` where there is
    none but perhaps the root."""
    part: BatchPart | None


def children(value: object) -> list[tuple[Key, object]] | None:
    """What a mapping, tuple, list or dataclass holds, by key, position or field name; `None` for anything else."""
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
    sample weights, and the rest is input. A mapping of tuples (several loaders) is read tuple by tuple. None, strings,
    numbers and objects of the user's own are passed over.

    Args:
        batch: Anything that a loader yields.
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
        found = [
            item for item in found if item.part not in {None, BatchPart.INPUT} or _is_under(item.path, roles.input)
        ]
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
    """How large the values of a floating tensor are, over its finite elements.

    Returns:
        `mean`, `std` (of the population), `max_abs`, `nonfinite` (how many elements are NaN or ±Inf) and `zeros` (share
        of the elements, 0 to 1); each of shape `()`, float32 or wider, on the tensor's device. mean and std are NaN
        where no element is finite. Sums are taken of values divided by the largest, so that no finite tensor overflows.
        Empty for a tensor without elements, of another dtype, or with a layout that has no plain values (sparse,
        nested, sharded). Never blocks, draws no random numbers.
    """
    if not _is_plain(tensor) or not tensor.is_floating_point():
        return {}
    with torch.no_grad():
        values = tensor.detach()
        values = values.to(
            torch.promote_types(values.dtype, torch.float32) if values.element_size() > 1 else torch.float32
        )
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
    """How the classes of an integer target, or the tokens of an input, are spread over the batch, by their remainders modulo 64, so that the cost does not depend on the values.

    By comparison with every bin: counting by value (`unique`, `bincount`) waits for the device, and scattering is
    refused where the user asks for deterministic kernels.

    Returns:
        `distinct`: how many of the 64 remainders occur, the number of classes in the batch where there are up to 64;
        `entropy`: of their shares, in nats, log(k) for k equally frequent ones; `largest`: share of the most frequent;
        `longest_run`: elements in a row, in row-major order, with the same value; each of shape `()`; `histogram`: how
        often each remainder occurs, shape `(64,)`; all float32 on the tensor's device. Empty for other dtypes,
        booleans, and more than 65,536 elements. Never blocks.
    """
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    if not _is_plain(tensor) or not is_integer or tensor.numel() > MAX_DISTINCT_VALUES:
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
    """How evenly the sample weights of a batch are spread.

    Returns:
        `ess`: the effective sample size (sum w)² / sum w² (Kish) as a share of their number, 1 where all are equal, 1 /
        n where one has everything; `max_share`: the largest weight's share of the sum of the absolute weights; shape
        `()`, float32 or wider, on the tensor's device, NaN where all are 0. Empty for tensors that are not floating.
        Never blocks.
    """
    if not _is_plain(tensor) or not tensor.is_floating_point():
        return {}
    with torch.no_grad():
        weights = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        unit = weights / weights.abs().amax()
        return {
            "ess": unit.sum().square() / (unit.square().sum() * weights.numel()),
            "max_share": 1.0 / unit.abs().sum(),
        }


def _longest_run(values: Tensor) -> Tensor:
    """The longest distance from the beginning of a run to an element of it, and 1."""
    if values.numel() == 1:
        return torch.ones((), device=values.device)
    place = _places(values.numel() - 1, values.device) + 1.0
    begins = place * (values[1:] != values[:-1])
    return (place - begins.cummax(dim=0).values).amax() + 1.0


@functools.lru_cache(maxsize=32)
def _places(count: int, device: torch.device) -> Tensor:
    """0, 1, … as a tensor that is made once for each length and device."""
    return torch.arange(count, device=device)


def _statistics(leaf: BatchLeaf) -> dict[str, Tensor]:
    if leaf.part is not BatchPart.WEIGHT and (classes := class_statistics(leaf.value)):
        return classes
    values = value_statistics(leaf.value)
    return values | weight_statistics(leaf.value) if leaf.part is BatchPart.WEIGHT else values


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not hasattr(tensor, "full_tensor")
        and tensor.device.type != "meta"
        and tensor.numel() > 0
    )


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
    """Apply the convention for tuples and lists to the batch itself, or to each value of a mapping that names no target."""
    if isinstance(batch, (list, tuple)):
        _mark_last(found, 0)
    elif all(item.part is None for item in found):
        for key, item in children(batch) or []:
            if isinstance(item, (list, tuple)):
                _mark_last([f for f in found if f.path[0] == key], 1)


def _mark_last(found: Sequence[_Found], level: int) -> None:
    """Of tensors that lie in one tuple at `level` of the nesting, mark the last, and the whole last item where it holds a mapping."""
    if len(found) < 2 or any(f.part is BatchPart.TARGET for f in found):  # noqa: PLR2004 - a lone tensor is input
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
    """The bare part where it says enough: one tensor of that part, found by position."""
    parts = [item.part or BatchPart.INPUT for item in found]
    for item, part in zip(found, parts, strict=True):
        alone = parts.count(part) == 1 and not any(isinstance(key, str) for key in item.path)
        name = part.value if alone else f"{part}.{_joined(item.path)}"
        yield BatchLeaf(name=name, path=item.path, part=part, value=item.value)
