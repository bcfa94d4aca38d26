"""Values of any structure as JSON and tensors, and back exactly as they were: what a scene is written with.

Unlike the dump of a batch, which is for readers of all kinds, this is for running again: types, strides and what is
shared between values come back, and what cannot come back is refused
when it is written. Reading runs no code that the file brings: objects of classes that are there are made by
`__new__` and given their state as pickle would give it to them.
"""

import base64
import collections
import copyreg
import dataclasses
import datetime as dt
import hashlib
import importlib
import math
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from lightning_spike.actions.batch_dump import SAFETENSORS_DTYPES
from lightning_spike.errors import CannotReplay
from lightning_spike.signals.random_state import RandomState

MIN_ARRAY_LENGTH: Final = 32
"""Length from which a list or tuple of whole numbers is stored as an array; random states have 625. An
engineering choice."""
MAX_STORAGE_RATIO: Final = 2
"""Storage size over elements up to which a tensor's whole storage is written, so that its strides are restored;
engineering choice. With more gaps it is made contiguous."""
MAX_NESTING: Final = 64
"""Maximum nesting, below Python's recursion limit; engineering choice."""
INT64_LIMIT: Final = 1 << 63
"""First whole number above int64, by definition."""

CALLED: Final = (
    set, frozenset, bytearray, slice, range,
    collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque,
    dt.date, dt.datetime, dt.timedelta,
    pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath,
    random.Random, torch.Size, torch.device,
)  # fmt: skip
"""Classes that are made by calling them with what their `__reduce_ex__` gives; known to do nothing else."""

Node = Any
"""A JSON value: a plain value as itself, anything else as an object with a `kind`."""


class TooLarge(CannotReplay):
    """More bytes than were allowed."""


class Encoder:
    """Turns values into nodes for JSON, and their tensors into a flat collection in which the same content stands once.

    Args:
        limit: Bytes of tensors and arrays allowed.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.tensors: dict[str, Tensor] = {}
        """On the host, by where they were met first; none shares memory with another."""
        self.nbytes = 0
        """Total bytes of all tensors."""
        self._limit = limit
        self._keys: dict[tuple[str, bytes], str] = {}
        self._met: dict[int, Node] = {}
        self._alive: list[object] = []
        self._level = 0
        self._shared = 0

    def encode(self, value: object, path: str) -> Node:
        """One value; blocks where it is on a device.

        Args:
            value: Anything.
            path: What it is called, in the names of tensors and in errors.

        Raises:
            CannotReplay: Something in it cannot be written so that it comes back; the message names it.
            TooLarge: The limit is passed.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"kind": "float", "value": str(value)}
        if id(value) in self._met:
            return self._again(self._met[id(value)], value, path)
        return self._new(value, path)

    def _again(self, node: dict[str, Any], value: object, path: str) -> Node:
        if "kind" not in node and isinstance(value, tuple):
            raise _refused(path, value, "holds itself")
        if "id" not in node:
            self._shared += 1
            node["id"] = self._shared
        return {"kind": "same", "id": node["id"]}

    def _new(self, value: object, path: str) -> Node:
        self._level += 1
        if self._level > MAX_NESTING:
            raise _refused(path, value, "is nested too deeply")
        node: dict[str, Any] = {}
        self._met[id(value)] = node
        self._alive.append(value)  # an id is good for as long as its object lives
        node |= self._node(value, path)
        self._level -= 1
        return node

    def _node(self, value: object, path: str) -> dict[str, Any]:
        match value:
            case Tensor():
                return self._tensor(value, path)
            case np.ndarray() | np.generic():
                return self._array(value, path)
            case list() | tuple() if type(value) in (list, tuple):
                return self._sequence(value, path)
            case dict() if type(value) is dict:
                return {"kind": "dict", "items": self._pairs(value.items(), path)}
            case _ if _is_record(value):
                return self._record(value, path)
            case _:
                return _constant(value, path) or self._object(value, path)

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: str) -> dict[str, Any]:
        name = type(value).__name__
        if len(value) >= MIN_ARRAY_LENGTH and all(
            type(item) is int and -INT64_LIMIT <= item < INT64_LIMIT for item in value
        ):
            return {"kind": "integers", "of": name, "key": self._keep(torch.tensor(value, dtype=torch.int64), path)}
        return {"kind": name, "items": [self.encode(item, f"{path}.{k}") for k, item in enumerate(value)]}

    def _pairs(self, items: Iterable[tuple[Any, Any]], path: str) -> list[list[Node]]:
        return [[self.encode(key, path), self.encode(item, f"{path}.{key}")] for key, item in items]

    def _record(self, value: Any, path: str) -> dict[str, Any]:
        state = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        state |= getattr(value, "__dict__", {})
        fields = {name: self.encode(item, f"{path}.{name}") for name, item in state.items()}
        return {"kind": "record", "class": class_name(type(value), path), "fields": fields}

    def _object(self, value: object, path: str) -> dict[str, Any]:
        """Encodes an object by its `__reduce_ex__`, in the plain form only."""
        make, arguments, state, items, pairs = _reduced(value, path)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # typeshed leaves it out
            kind, *arguments = arguments
        elif make in CALLED:
            kind = make
        else:
            raise _refused(path, value, "could not be made again")
        node: dict[str, Any] = {"kind": "object", "class": class_name(kind, path)}
        node["arguments"] = [self.encode(item, f"{path}.{k}") for k, item in enumerate(arguments)]
        if state is not None:
            node["state"] = self.encode(state, path)
        if items is not None:
            node["items"] = [self.encode(item, f"{path}.{k}") for k, item in enumerate(items)]
        if pairs is not None:
            node["pairs"] = self._pairs(pairs, path)
        return node

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise _refused(path, value, "is no plain tensor")
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.device.type == "meta":
            raise _refused(path, value, "is sparse, nested, quantized or empty of data")
        plain = value.detach().resolve_conj().resolve_neg()
        if _span(plain) > MAX_STORAGE_RATIO * plain.numel():
            plain = plain.contiguous()
        flat = plain.as_strided((_span(plain),), (1,), plain.storage_offset()).cpu()
        node: dict[str, Any] = {
            "kind": "tensor",
            "key": self._keep(flat, path),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        node |= {"shape": list(plain.shape), "stride": list(plain.stride())}
        node |= {"parameter": True} if isinstance(value, torch.nn.Parameter) else {}
        node |= {"requires_grad": True} if value.requires_grad else {}
        return node | ({"on_device": True} if value.device.type != "cpu" or _is_pinned(value) else {})

    def _array(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> dict[str, Any]:
        dtype = value.dtype
        if dtype.hasobject or dtype.names is not None:
            raise _refused(path, value, "holds objects or records")
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            raise _refused(path, value, "is no plain array")
        raw = np.frombuffer(np.asarray(value).tobytes(), dtype=np.uint8).copy()
        node: dict[str, Any] = {"kind": "array" if isinstance(value, np.ndarray) else "scalar", "dtype": dtype.str}
        return node | {"shape": list(value.shape), "key": self._keep(torch.from_numpy(raw), path)}

    def _keep(self, flat: Tensor, path: str) -> str:
        """The name under which this content is held."""
        raw = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        seen = raw.view(torch.uint8)
        content = (str(flat.dtype), hashlib.blake2b(seen.numpy().data, digest_size=16).digest())
        if content in self._keys:
            return self._keys[content]
        self.nbytes += seen.numel()
        if self.nbytes > self._limit:
            msg = f"it takes more than {self._limit / 1e6:g} MB"
            raise TooLarge(msg)
        key = path
        while key in self.tensors:
            key += "'"
        stored = raw if raw.dtype in SAFETENSORS_DTYPES else seen
        owns = stored.untyped_storage().nbytes() == seen.numel()
        self.tensors[key] = stored if owns else stored.clone()
        self._keys[content] = key
        return key


class Decoder:
    """Turns nodes back into values.

    Args:
        tensors: As the encoder collected them, on the host; they may end up in the values.
        device: Where tensors go that were on a device.
        host_too: Those that were on the host go there as well, but for single numbers and random states: for a run on
            the CPU that is read for a device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, *, host_too: bool = False) -> None:
        self._tensors = tensors
        self._device = device
        self._host_too = host_too
        self._taken: set[str] = set()
        self._made: dict[int, object] = {}

    def decode(self, node: Node) -> Any:
        """One value.

        Raises:
            CannotReplay: A class is not there, or is not what it was.
        """
        if not isinstance(node, dict):
            return node
        make: Callable[[dict[str, Any]], object] = getattr(self, f"_make_{node['kind']}")
        return make(node)

    def _remember(self, node: Mapping[str, Any], value: Any) -> Any:
        if "id" in node:
            self._made[node["id"]] = value
        return value

    def _make_same(self, node: dict[str, Any]) -> object:
        return self._made[node["id"]]

    def _make_float(self, node: dict[str, Any]) -> object:
        return float(node["value"])

    def _make_bytes(self, node: dict[str, Any]) -> object:
        return self._remember(node, base64.b64decode(node["base64"]))

    def _make_dtype(self, node: dict[str, Any]) -> object:
        return self._remember(node, _dtype(node["name"]))

    def _make_class(self, node: dict[str, Any]) -> object:
        return self._remember(node, find_class(node["class"]))

    def _make_enum(self, node: dict[str, Any]) -> object:
        return self._remember(node, _subclass(node["class"], Enum)[node["name"]])

    def _make_integers(self, node: dict[str, Any]) -> object:
        numbers = self._tensors[node["key"]].tolist()
        return self._remember(node, tuple(numbers) if node["of"] == "tuple" else numbers)

    def _make_list(self, node: dict[str, Any]) -> object:
        made = self._remember(node, [])
        made.extend(self.decode(item) for item in node["items"])
        return made

    def _make_tuple(self, node: dict[str, Any]) -> object:
        return self._remember(node, tuple(self.decode(item) for item in node["items"]))

    def _make_dict(self, node: dict[str, Any]) -> object:
        made = self._remember(node, {})
        made.update((self.decode(key), self.decode(item)) for key, item in node["items"])
        return made

    def _make_record(self, node: dict[str, Any]) -> object:
        kind = find_class(node["class"])
        if not dataclasses.is_dataclass(kind):
            msg = f"{node['class']} is not a dataclass any more"
            raise CannotReplay(msg)
        made = self._remember(node, object.__new__(kind))
        place = self._device, self._host_too
        if kind is RandomState:
            self._device, self._host_too = torch.device("cpu"), False
        state = _defaults(kind) | {name: self.decode(item) for name, item in node["fields"].items()}
        self._device, self._host_too = place
        for name, item in state.items():
            object.__setattr__(made, name, item)
        return made

    def _make_object(self, node: dict[str, Any]) -> object:
        kind = find_class(node["class"])
        arguments = [self.decode(item) for item in node["arguments"]]
        made = kind(*arguments) if kind in CALLED else kind.__new__(kind, *arguments)
        self._remember(node, made)
        if "state" in node:
            _set_state(made, self.decode(node["state"]))
        for item in node.get("items", ()):
            made.append(self.decode(item))
        for key, item in node.get("pairs", ()):
            made[self.decode(key)] = self.decode(item)
        return made

    def _make_tensor(self, node: dict[str, Any]) -> object:
        flat = self._own(node["key"])
        dtype = _dtype(node["dtype"])
        if dtype.is_complex:
            flat = torch.view_as_complex(flat.view(-1, 2))
        elif flat.dtype is not dtype:
            flat = flat.view(dtype)
        value = flat.as_strided(node["shape"], node["stride"])
        moved = node.get("on_device", False) or (self._host_too and value.dim() > 0)
        value = value.to(self._device) if moved else value
        if node.get("parameter", False):
            return self._remember(node, torch.nn.Parameter(value, requires_grad=node.get("requires_grad", False)))
        return self._remember(node, value.requires_grad_(node.get("requires_grad", False)))

    def _make_array(self, node: dict[str, Any]) -> object:
        raw = self._own(node["key"]).numpy()
        return self._remember(node, raw.view(np.dtype(node["dtype"])).reshape(node["shape"]))

    def _make_scalar(self, node: dict[str, Any]) -> object:
        raw = self._own(node["key"]).numpy()
        return self._remember(node, raw.view(np.dtype(node["dtype"]))[0])

    def _own(self, key: str) -> Tensor:
        """Memory of its own: values of the same content are not the same value."""
        flat = self._tensors[key].reshape(-1)
        if key in self._taken:
            return flat.clone()
        self._taken.add(key)
        return flat


# -- classes by name ---------------------------------------------------------------------------------------------------


def class_name(kind: type, path: str) -> str:
    """`package.module:Class`, by which another process finds it.

    A class of the script that is being run by the name that the script has as a module.

    Args:
        kind: The class.
        path: What it is the class of, for the error.

    Raises:
        CannotReplay: It has no such name: it was made inside a function, or in an interactive session.
    """
    module = sys.modules.get(kind.__module__)
    found: object = module
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    name = _main_name() if kind.__module__ == "__main__" else kind.__module__
    if found is not kind or name is None:
        msg = f"{path} is of the class {kind.__qualname__}, which another process cannot import"
        raise CannotReplay(msg)
    return f"{name}:{kind.__qualname__}"


def find_class(name: str) -> type[Any]:
    """The class that `class_name` named; imports its module.

    Raises:
        CannotReplay: It cannot be imported.
    """
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        msg = f"{name} cannot be imported here ({why}); run this from where the training was started"
        raise CannotReplay(msg) from error
    if not isinstance(found, type):
        msg = f"{name} is not a class any more"
        raise CannotReplay(msg)
    return found


def script_folder() -> str | None:
    """The folder of the running script, for its own modules; `None` for `python -m` and interactive sessions."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return None if file is None or getattr(main, "__spec__", None) is not None else str(Path(file).resolve().parent)


def _main_name() -> str | None:
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return cast("str", spec.name)
    return None if file is None else Path(file).stem


def _subclass(name: str, of: type[Any]) -> Any:
    kind = find_class(name)
    if not issubclass(kind, of):
        msg = f"{name} is no {of.__name__} any more"
        raise CannotReplay(msg)
    return kind


# -- inside ------------------------------------------------------------------------------------------------------------


def _constant(value: object, path: str) -> dict[str, Any] | None:
    """The node of a value that has no parts, `None` for any other."""
    match value:
        case bytes() if type(value) is bytes:
            return {"kind": "bytes", "base64": base64.b64encode(value).decode("ascii")}
        case torch.dtype():
            return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
        case type():
            return {"kind": "class", "class": class_name(value, path)}
        case Enum():
            return {"kind": "enum", "class": class_name(type(value), path), "name": value.name}
        case _:
            return None


def _is_record(value: object) -> bool:
    """A dataclass that holds nothing beside its fields and attributes."""
    is_container = isinstance(value, (Mapping, list, tuple, type))
    return dataclasses.is_dataclass(value) and not is_container


def _reduced(value: object, path: str) -> tuple[Any, Any, Any, Any, Any]:
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as error:
        raise _refused(path, value, f"cannot be taken apart ({type(error).__name__}: {error})") from error
    if not isinstance(reduced, tuple):
        raise _refused(path, value, "could not be made again")
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    return make, arguments, state, items, pairs


def _set_state(made: Any, state: Any) -> None:
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    vars(made).update(attributes or {})
    for name, item in (slots or {}).items():
        object.__setattr__(made, name, item)


def _defaults(kind: Any) -> dict[str, Any]:
    """Default values by field: a newer record may have more fields than the written one."""
    fields = dataclasses.fields(kind)
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return plain | {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        msg = f"this torch has no dtype {name}"
        raise CannotReplay(msg)
    return dtype


def _span(tensor: Tensor) -> int:
    """Elements of memory from a tensor's first to its last, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.is_pinned()


def _refused(path: str, value: object, why: str) -> CannotReplay:
    return CannotReplay(f"{path} ({type(value).__module__}.{type(value).__qualname__}) {why}")
