"""What a module keeps in attributes of its own.

Counters, running values, lists, generators that its loss may depend on.

Parameters and buffers are not in it (`state_copy` has them). The copy is plain: tensors, arrays, numbers, strings and
containers of them, so that it can be written to a file; the way back writes into the containers and objects that are
there, as others may hold them too.
"""

import dataclasses
import random
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

MOST_ITEMS: Final = 1000
"""Entries of a container up to which it is copied: each tensor in it is an operation on the device, and who collects
more of them computes no loss from them."""
MOST_BYTES: Final = 64 << 20
"""Bytes of tensors and arrays in attributes up to which they are copied: some milliseconds of the host's time."""

PLAIN: Final = (
    types.NoneType,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    Enum,
    PurePath,
    np.generic,
    torch.dtype,
    torch.device,
    torch.Size,
)
"""Immutable: held by reference."""
FAST: Final = frozenset({type(None), bool, int, float, str})
"""Nearly all attributes are of these types; a look-up is cheaper than an `isinstance`."""
MACHINERY: Final = (frozenset(vars(nn.Module())) | frozenset(vars(LightningModule()))) - {"training"}
"""What the classes themselves keep in every module."""
NOT_THEIRS: Final = sys.stdlib_module_names | {"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy"}
"""Packages whose objects are no record of the user's."""


class Untouched(Enum):
    """Stands for what is no state (a function, a registered weight) or cannot be copied: it is left as it is."""

    UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratorState:
    """The state of a random generator that hangs on a module."""

    state: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an object of the user's own class, by name."""

    values: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnState:
    """A copy of the attributes of a module and all its submodules."""

    attributes: dict[str, dict[str, Any]]
    """By the submodule's name (`""` for the module itself), then by the attribute's; the mode (`training`) is one of
    them."""
    frozen: frozenset[str]
    """Names of the parameters that take no gradient."""
    left_out: tuple[str, ...]
    """Attributes that are too large or of a kind that cannot be copied; a loss that depends on them cannot be had
    again."""


def copy_own(module: nn.Module) -> OwnState:
    """Copy the attributes of a module tree; numbers and strings by reference, tensors cloned on their device.

    Never blocks, and draws no random number. Containers beyond `MOST_ITEMS`, and tensors and arrays beyond `MOST_BYTES`
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
    return OwnState(attributes=attributes, frozen=frozen, left_out=tuple(copier.left_out))


def load_own(module: nn.Module, saved: OwnState) -> None:
    """Put the attributes back; the copy can be put back again.

    An attribute that has come to be since is removed, if it is state.

    Containers and objects are filled in place, tensors replaced by clones.
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
        if (state := _generator_state(thing)) is not None:
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
        if len(thing) > MOST_ITEMS:
            self.left_out.append(path)
            return Untouched.UNTOUCHED
        if isinstance(thing, dict):
            kind = next(kind for kind in (Counter, OrderedDict, dict) if isinstance(thing, kind))
            return kind({key: self.copy(f"{path}.{key}", value) for key, value in dict.items(thing)})
        if isinstance(thing, (set, frozenset)):
            return type(thing)(thing) if all(isinstance(item, PLAIN) for item in thing) else Untouched.UNTOUCHED
        items = [self.copy(f"{path}[{index}]", item) for index, item in enumerate(thing)]
        if isinstance(thing, deque):
            return deque(items, maxlen=thing.maxlen)
        if isinstance(thing, tuple):
            return type(thing)(*items) if hasattr(thing, "_fields") else tuple(items)
        return items

    def _fits(self, path: str, nbytes: int) -> bool:
        fits = self._bytes + nbytes <= MOST_BYTES
        if fits:
            self._bytes += nbytes
        else:
            self.left_out.append(path)
        return fits

    def _weights(self) -> frozenset[int]:
        """Where the registered tensors lie: a view of one of them is no state of its own."""
        if self._registered is None:
            tensors = (t for t in (*self._module.parameters(), *self._module.buffers()) if not is_lazy(t))
            self._registered = frozenset(
                t.untyped_storage().data_ptr()
                for t in tensors
                if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
            )
        return self._registered


class _Putter:
    """Puts copies back; what was one object in several places is one again."""

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
            _set_generator(live, saved.state)
        elif isinstance(saved, Attributes) and _is_record(live):
            for key, value in saved.values.items():
                object.__setattr__(live, key, self.value(getattr(live, key, Untouched.UNTOUCHED), value))

    def _container(self, live: Any, saved: Any) -> Any:
        new: Any = self._mapping(live, saved) if isinstance(saved, dict) else self._sequence(live, saved)
        if isinstance(saved, tuple) or not isinstance(live, _base(saved)):
            return new
        # The methods of the base: a subclass may do more in its own.
        if isinstance(live, list):
            live[:] = new
        elif isinstance(live, dict):
            base = OrderedDict if isinstance(live, OrderedDict) else dict
            base.clear(live)
            base.update(live, new)
        elif isinstance(live, deque):
            live.clear()
            live.extend(new)
        elif isinstance(live, set):
            live.clear()
            live.update(new)
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
        items = [item for item in items if not isinstance(item, Untouched)]
        if isinstance(saved, deque):
            return deque(items, maxlen=saved.maxlen)
        if isinstance(saved, tuple):
            return type(saved)(*items) if hasattr(saved, "_fields") else tuple(items)
        return items


def _base(saved: object) -> type:
    return next(kind for kind in (dict, list, deque, set) if isinstance(saved, kind))


def _filled_array(live: Any, saved: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    fits = isinstance(live, np.ndarray) and live.shape == saved.shape and live.dtype == saved.dtype
    if not (fits and live.flags.writeable):
        return saved.copy()
    live[...] = saved
    return live  # type: ignore[no-any-return]


def _generator_state(thing: object) -> Any | None:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.Generator):
        return thing.bit_generator.state
    if isinstance(thing, np.random.RandomState):
        return thing.get_state()
    return thing.getstate() if isinstance(thing, random.Random) else None


def _set_generator(live: object, state: Any) -> None:
    if isinstance(live, (torch.Generator, np.random.RandomState)):
        live.set_state(state)
    elif isinstance(live, np.random.Generator):
        live.bit_generator.state = state
    elif isinstance(live, random.Random):
        live.setstate(state)


def _is_record(thing: object) -> bool:
    """An object of a class of the user's own."""
    kind = type(thing)
    if isinstance(thing, (type, types.FunctionType, types.MethodType, types.ModuleType, Untouched, *PLAIN)):
        return False
    return kind.__module__.partition(".")[0] not in NOT_THEIRS and not isinstance(thing, Iterator)


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    yield from (getattr(thing, "__dict__", None) or {}).items()
    for base in type(thing).__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if hasattr(thing, name) and name not in ("__dict__", "__weakref__"):
                yield name, getattr(thing, name)


def _is_state(value: object) -> bool:
    return isinstance(value, (*PLAIN, Mapping, list, tuple, deque, set, np.ndarray)) or (
        isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    )
