"""Copy and restore the attributes of a module: counters, running values, lists, generators.

Parameters and buffers are left to `state_copy`. The copy consists of tensors, arrays, numbers, strings and containers
of them, so that it can be written to a file. Loading writes into the present containers and objects, as others can
hold them too.
"""

import dataclasses
import random
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

MAX_ITEMS: Final = 1000
"""Entries of a container that is copied: each tensor in it is an operation on the device; engineering choice."""
MAX_BYTES: Final = 64 << 20
"""Bytes of tensors and arrays that are copied, some milliseconds of host time; engineering choice."""

PLAIN: Final = (
    *(types.NoneType, bool, int, float, complex, str, bytes, range, slice, Enum, PurePath),
    *(np.generic, torch.dtype, torch.device, torch.Size),
)
"""Immutable types, kept by reference."""
FAST: Final = frozenset({type(None), bool, int, float, str})
"""Types of nearly all attributes; a look-up is cheaper than an `isinstance`."""
MACHINERY: Final = (frozenset(vars(nn.Module())) | frozenset(vars(LightningModule()))) - {"training"}
"""Attributes that the base classes keep in every module."""
LIBRARIES: Final = sys.stdlib_module_names | {"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy"}
"""Packages whose objects are not the user's own."""


class Untouched(Enum):
    """Marks a value that is no state (a function, a registered weight) or cannot be copied; it stays as it is."""

    UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratorState:
    """The state of a random generator that a module holds."""

    state: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an object of the user's own class, by name."""

    values: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttributeState:
    """A copy of the attributes of a module and all its submodules."""

    attributes: dict[str, dict[str, Any]]
    """By the submodule's name (`""` for the module itself), then by the attribute's, `training` included."""
    frozen: frozenset[str]
    """Names of the parameters that require no gradient."""
    left_out: tuple[str, ...]
    """Attributes that are too large or cannot be copied; a loss that depends on them cannot be reproduced."""


def copy_attributes(module: nn.Module) -> AttributeState:
    """Copy the attributes of a module tree, with tensors cloned on their device.

    Never blocks and draws no random number. Containers beyond `MAX_ITEMS`, and tensors and arrays beyond `MAX_BYTES`
    in all, are left out.
    """
    copier = _Copier(module)
    attributes = {
        name: {
            key: value if type(value) in FAST else copier.copy(f"{name}.{key}".lstrip("."), value)
            for key, value in vars(part).items()
            if key not in MACHINERY
        }
        for name, part in module.named_modules()
    }
    frozen = frozenset(name for name, p in module.named_parameters() if not p.requires_grad)
    return AttributeState(attributes=attributes, frozen=frozen, left_out=tuple(copier.left_out))


def load_attributes(module: nn.Module, saved: AttributeState) -> None:
    """Restore the attributes, any number of times.

    Fills containers and objects in place, replaces tensors by clones and removes state that was added since.
    """
    put = _Putter()
    for name, part in module.named_modules():
        if (attributes := saved.attributes.get(name)) is None:
            continue
        held = vars(part)
        for key, value in attributes.items():
            put.into(held, key, value)
        for key in [key for key in held if key not in attributes and key not in MACHINERY and _is_state(held[key])]:
            del held[key]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == (name in saved.frozen):
            parameter.requires_grad_(name not in saved.frozen)


class _Copier:
    def __init__(self, module: nn.Module) -> None:
        self.left_out: list[str] = []
        self._module = module
        self._registered: frozenset[int] | None = None
        self._bytes = 0
        self._memo: dict[int, Any] = {}

    def copy(self, path: str, thing: Any) -> Any:
        if isinstance(thing, PLAIN):
            return thing
        if id(thing) not in self._memo:
            self._memo[id(thing)] = Untouched.UNTOUCHED  # should it hold itself
            self._memo[id(thing)] = self._copied(path, thing)
        return self._memo[id(thing)]

    def _copied(self, path: str, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self._tensor(path, thing)
        if isinstance(thing, np.ndarray):
            return thing.copy() if thing.dtype != object and self._fits(path, thing.nbytes) else Untouched.UNTOUCHED
        if isinstance(thing, (dict, list, deque, tuple, set, frozenset)):
            return self._container(path, thing)
        return self._object(path, thing)

    def _object(self, path: str, thing: object) -> GeneratorState | Attributes | Untouched:
        if (state := generator_state(thing)) is not None:
            return GeneratorState(state)
        if isinstance(thing, (Optimizer, nn.Module)):
            if isinstance(thing, Optimizer) or thing not in set(self._module.modules()):
                self.left_out.append(path)
        elif _is_record(thing):
            return Attributes({key: self.copy(f"{path}.{key}", value) for key, value in _attributes(thing)})
        return Untouched.UNTOUCHED

    def _tensor(self, path: str, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or is_lazy(tensor):
            return Untouched.UNTOUCHED
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
            self.left_out.append(path)
            return Untouched.UNTOUCHED
        if tensor.untyped_storage().data_ptr() in self._weights() and tensor.numel():
            return Untouched.UNTOUCHED
        if not self._fits(path, tensor.nbytes):
            return Untouched.UNTOUCHED
        return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def _container(self, path: str, thing: Any) -> Any:
        if len(thing) > MAX_ITEMS:
            self.left_out.append(path)
            return Untouched.UNTOUCHED
        if isinstance(thing, dict):
            kind = next(kind for kind in (Counter, OrderedDict, dict) if isinstance(thing, kind))
            return kind({key: self.copy(f"{path}.{key}", value) for key, value in dict.items(thing)})
        if isinstance(thing, (set, frozenset)):
            return type(thing)(thing) if all(isinstance(item, PLAIN) for item in thing) else Untouched.UNTOUCHED
        return _like(thing, [self.copy(f"{path}[{index}]", item) for index, item in enumerate(thing)])

    def _fits(self, path: str, nbytes: int) -> bool:
        fits = self._bytes + nbytes <= MAX_BYTES
        if fits:
            self._bytes += nbytes
        else:
            self.left_out.append(path)
        return fits

    def _weights(self) -> frozenset[int]:
        """Memory of the registered tensors; a view of one of them is no separate state."""
        if self._registered is None:
            tensors = (t for t in (*self._module.parameters(), *self._module.buffers()) if not is_lazy(t))
            self._registered = frozenset(
                t.untyped_storage().data_ptr()
                for t in tensors
                if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
            )
        return self._registered


class _Putter:
    """Restores copies; one object in several places stays one object."""

    def __init__(self) -> None:
        self._clones: dict[int, Tensor] = {}

    def into(self, held: dict[str, Any], key: str, value: Any) -> None:
        live = held.get(key, Untouched.UNTOUCHED)
        new = value if type(value) in FAST else self.value(live, value)
        if new is not live:
            held[key] = new

    def value(self, live: Any, saved: Any) -> Any:
        if isinstance(saved, (Untouched, GeneratorState, Attributes)):
            self._object(live, saved)
            return live
        if isinstance(saved, Tensor):
            if id(saved) not in self._clones:
                self._clones[id(saved)] = saved.detach().clone().requires_grad_(saved.requires_grad)
            return self._clones[id(saved)]
        if isinstance(saved, np.ndarray):
            return _filled_array(live, saved)
        if isinstance(saved, (dict, list, deque, set, tuple)) and not isinstance(saved, torch.Size):
            return self._container(live, saved)
        return saved

    def _object(self, live: object, saved: Untouched | GeneratorState | Attributes) -> None:
        if isinstance(saved, GeneratorState):
            set_generator_state(live, saved.state)
        elif isinstance(saved, Attributes) and _is_record(live):
            for key, value in saved.values.items():
                object.__setattr__(live, key, self.value(getattr(live, key, Untouched.UNTOUCHED), value))

    def _container(self, live: Any, saved: Any) -> Any:
        new: Any = self._mapping(live, saved) if isinstance(saved, dict) else self._sequence(live, saved)
        if isinstance(saved, tuple) or not isinstance(live, dict if isinstance(saved, dict) else _base(saved)):
            return new
        refill(live, new)
        return live

    def _mapping(self, live: Any, saved: dict[Any, Any]) -> dict[Any, Any]:
        there = live if isinstance(live, dict) else {}
        pairs = ((key, self.value(there.get(key, Untouched.UNTOUCHED), value)) for key, value in saved.items())
        return type(saved)({key: value for key, value in pairs if not isinstance(value, Untouched)})

    def _sequence(self, live: Any, saved: Any) -> Any:
        if isinstance(saved, set):
            return set(saved)
        there = list(live) if isinstance(live, (list, tuple, deque)) else []
        there += [Untouched.UNTOUCHED] * (len(saved) - len(there))
        items = [self.value(now, then) for now, then in zip(there, saved, strict=False)]
        return _like(saved, [item for item in items if not isinstance(item, Untouched)])


def _like(sequence: Any, items: list[Any]) -> Any:
    """A list, tuple, named tuple or deque of these items, as the sequence is one."""
    if isinstance(sequence, deque):
        return deque(items, maxlen=sequence.maxlen)
    if isinstance(sequence, tuple):
        return type(sequence)(*items) if hasattr(sequence, "_fields") else tuple(items)
    return items


def _base(thing: object) -> Any:
    return next(kind for kind in (OrderedDict, dict, list, deque, set) if isinstance(thing, kind))


def refill(container: Any, content: Any) -> None:
    """Replace the content of a mapping, list, deque or set in place.

    Calls the methods of the base: a subclass can do more in its own, and dict's break the order of an OrderedDict.
    """
    base = _base(container)
    base.clear(container)
    add = getattr(base, "update", None) or base.extend
    add(container, content)


def _filled_array(live: Any, saved: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    fits = isinstance(live, np.ndarray) and live.shape == saved.shape and live.dtype == saved.dtype
    if not (fits and live.flags.writeable):
        return saved.copy()
    live[...] = saved
    return live  # type: ignore[no-any-return]


def generator_state(thing: object) -> Any | None:
    """The state of a random generator; `None` for any other object."""
    if isinstance(thing, np.random.Generator):
        thing = thing.bit_generator
    if isinstance(thing, np.random.BitGenerator):
        return thing.state
    if isinstance(thing, (torch.Generator, np.random.RandomState)):
        return thing.get_state()
    return thing.getstate() if isinstance(thing, random.Random) else None


def set_generator_state(live: object, state: Any) -> None:
    """Restore what `generator_state` returned; does nothing to any other object."""
    if isinstance(live, np.random.Generator):
        live = live.bit_generator
    if isinstance(live, np.random.BitGenerator):
        live.state = state
    elif isinstance(live, (torch.Generator, np.random.RandomState)):
        live.set_state(state)
    elif isinstance(live, random.Random):
        live.setstate(state)


def _is_record(thing: object) -> bool:
    """Whether an object is of a class of the user's own."""
    kind = type(thing)
    if isinstance(thing, (type, types.FunctionType, types.MethodType, types.ModuleType, Untouched, *PLAIN)):
        return False
    return kind.__module__.partition(".")[0] not in LIBRARIES and not isinstance(thing, Iterator)


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    yield from (getattr(thing, "__dict__", None) or {}).items()
    kind: Any = type(thing)  # mypy takes object for something without a hash
    yield from ((name, getattr(thing, name)) for name in slots_of(kind) if hasattr(thing, name))


@cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """The names of a class's slots, mangled as Python mangles them."""
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name not in ("__dict__", "__weakref__"):
                mangled = f"_{base.__name__.lstrip('_')}{name}"
                found.append(mangled if name.startswith("__") and not name.endswith("__") else name)
    return tuple(found)


def _is_state(value: object) -> bool:
    return isinstance(value, (*PLAIN, Mapping, list, tuple, deque, set, np.ndarray)) or (
        isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    )
