"""Turns frozen records into plain data and back; all records in files go through this module.

`to_plain` turns a record into dicts, lists, strings and numbers; `from_plain` builds the record from them by the types
of its fields. Fields that a file lacks take their defaults, and unknown keys are ignored, so files of older and newer
versions can be read. A file names no class: only the given type is built.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(record: object) -> Any:
    """A record as dicts, lists, strings, numbers and `None`; numbers that are not finite stay as they are."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: to_plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple | set | frozenset):
        return [to_plain(value) for value in record]
    return record.value if isinstance(record, Enum) else record


def from_plain(kind: type[T], content: object) -> T:
    """A record of this type from the output of `to_plain`.

    Raises:
        ValueError: The content does not fit the type; the message says where, what was expected and what was found.
    """
    built: T = _build(kind, content, kind.__name__)
    return built


def _build(kind: Any, content: object, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return content
    if origin in {typing.Union, types.UnionType}:
        return _build_union(kind, content, where)
    if origin is tuple:
        return _build_tuple(typing.get_args(kind), content, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(content, Mapping), kind, content, where)
        return types.MappingProxyType(dict(typing.cast("Mapping[str, Any]", content)))
    return _build_record(kind, content, where) if dataclasses.is_dataclass(kind) else _build_plain(kind, content, where)


def _build_union(kind: Any, content: object, where: str) -> Any:
    options = typing.get_args(kind)
    if content is None and type(None) in options:
        return None
    for option in options:
        try:
            return _build(option, content, where)
        except ValueError:
            continue
    return _expect(False, kind, content, where)


def _build_tuple(kinds: tuple[Any, ...], content: object, where: str) -> tuple[Any, ...]:
    _expect(isinstance(content, list | tuple), tuple, content, where)
    items = list(typing.cast("list[object]", content))
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    _expect(len(items) == len(kinds), f"{len(kinds)} items", content, where)
    return tuple(_build(kind, item, f"{where}[{k}]") for k, (kind, item) in enumerate(zip(kinds, items, strict=True)))


def _build_record(kind: Any, content: object, where: str) -> Any:
    _expect(isinstance(content, Mapping), kind, content, where)
    given = typing.cast("Mapping[str, object]", content)
    hints = _hints(kind)
    known = {
        f.name: _build(hints[f.name], given[f.name], f"{where}.{f.name}")
        for f in dataclasses.fields(kind)
        if f.name in given
    }
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in known and _is_required(f)]
    _expect(not missing, f"{kind.__name__} with {', '.join(missing)}", content, where)
    return kind(**known)


def _build_plain(kind: Any, content: object, where: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return _expect(content in typing.get_args(kind), kind, content, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _expect_enum(kind, content, where)
    if kind is float:
        if content is None:  # strict JSON has no NaN: it is null there
            return math.nan
        is_number = isinstance(content, int | float) and not isinstance(content, bool)
        return float(typing.cast("float", _expect(is_number, kind, content, where)))
    fits = isinstance(content, kind) and not (kind is int and isinstance(content, bool))
    return _expect(fits, kind, content, where)


def _expect_enum(kind: type[Enum], content: object, where: str) -> Enum:
    _expect(content in {member.value for member in kind}, kind, content, where)
    return kind(content)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(fits: bool, kind: object, content: object, where: str) -> object:
    if not fits:
        expected = getattr(kind, "__name__", str(kind))
        msg = f"{where}: expected {expected}, found {content!r:.80}"
        raise ValueError(msg)
    return content
