"""Keep the state of living objects, and put it back in place: every reference that others hold stays good.

A deep copy would not do: the optimizer, a logger or a callback may hold the very list, tensor or buffer that is to be
put back. So what is kept is, for every object that can be reached, what it held; putting back writes into the same
object.
"""

import dataclasses
import random
import re
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache, partial
from operator import is_
from pathlib import Path, PurePath
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_spike.errors import CannotReplay

MOST_OBJECTS: Final = 1_000_000
"""Objects to look at before giving up: about two seconds; a module that holds more is taken to hold a data set."""

SHARE_OF_MEMORY: Final = 0.5
"""Of the host memory that is free, the most that copies may take: an out-of-memory kill cannot be caught."""

NOTHING_TO_SPEAK_OF: Final = 1 << 26
"""Bytes up to which nobody asks how much memory is free: that takes half a millisecond."""

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
    type,
    Enum,
    PurePath,
    np.generic,
    np.dtype,
    torch.dtype,
    torch.device,
    torch.Size,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.CodeType,
    weakref.ReferenceType,
)
"""What cannot change, or whose change nobody could put back (the cells of a closure)."""

NOT_ENTERED: Final = (
    "lightning",
    "pytorch_lightning",
    "lightning_spike",
    "torch.utils.data",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed",
    "logging",
    "threading",
    "_thread",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "socket",
    "weakref",
)
"""Packages whose objects (other than modules) are machinery around the training: a training step does not keep state of
its own there."""

ATTRIBUTES_NOT_ENTERED: Final = frozenset({"_trainer", "_fabric"})
"""Where a `LightningModule` holds who drives it."""

MACHINERY_OF_MODULES: Final = re.compile(r"\._(?:modules|parameters|buffers)(?=\.)")
"""Left out of the paths in messages."""

FAST: Final = frozenset({type(None), bool, int, float, str, types.FunctionType, type})
"""Nearly everything is of these types; a look-up is cheaper than an `isinstance`."""

Undo: TypeAlias = Callable[[], object]
Path_: TypeAlias = tuple["Path_ | None", object, str]
"""Where something was found: in what, under which key, and how that is written. Put into words only where there is
something to say."""
Found: TypeAlias = tuple[Path_, object]


@dataclasses.dataclass(slots=True, eq=False)
class _Storage:
    """The bytes under one or more tensors."""

    live: Tensor
    """A uint8 view of its own: writing into it leaves autograd's version counters of the tensors alone."""
    kept: Tensor
    seen: list[Tensor]


class ObjectSnapshot:
    """What can be reached from some objects, as it is now.

    Followed are: modules (parameters, buffers that are persistent or not, gradients, modes, hooks, every attribute),
    lists, dicts, sets, deques, tensors, NumPy arrays, random generators, optimizers and any other object with
    attributes. Tensors are put back byte by byte, under all their views, without touching autograd's version counters.
    Not followed, so not put back: the cells of closures, globals, files, sparse tensors, and Lightning's own machinery.

    Takes one copy of every tensor, on its own device. Blocks.

    Args:
        roots: Where to begin, by the name that messages use.
        leave: Objects that are not followed.

    Raises:
        CannotReplay: Something can be reached that cannot be put back (an iterator, an open file), or there is too much
            of it.
    """

    def __init__(self, roots: Iterable[tuple[str, object]], *, leave: Iterable[object] = ()) -> None:
        self._left = tuple(leave)  # held, so that no id is used again
        self._seen: dict[int, object] = {id(thing): thing for thing in self._left}
        self._empty: list[Any] = []
        self._dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self._sequences: list[tuple[list[Any] | deque[Any], tuple[Any, ...]]] = []
        self._tensors: list[_Place] = []
        self._undo: list[Undo] = []
        self._live: dict[tuple[str, int], tuple[torch.UntypedStorage, list[Tensor]]] = {}
        self._walk([((None, name, "{}"), thing) for name, thing in roots])
        self._check_memory()
        self._storages = [
            _Storage(live := _bytes(storage), live.clone(), seen) for storage, seen in self._live.values()
        ]
        self._versions = self._now()
        counted = (tensor for storage in self._storages for tensor in storage.seen if not tensor.is_inference())
        self._counters = [_unsafe_preserve_version_counter(tensor) for tensor in counted]

    def put_back(self, *, trusting: bool = False) -> None:
        """Make everything as it was; may be called more than once. Blocks.

        Args:
            trusting: Leave memory alone if autograd's version counters of the tensors on it have not moved since: for
                what only a few known operations write into. A write through `.data` or by a foreign kernel does not
                move them.
        """
        with torch.no_grad():
            self._put_back_containers()
            for undo in self._undo:
                undo()
            for place in self._tensors:
                place.put_back()
            if not trusting or self._now() != self._versions:
                _copy_all([s.live for s in self._storages], [s.kept for s in self._storages])
                self._versions = self._now()

    def forget_writes(self) -> None:
        """Put autograd's version counters back too, at the end.

        Whoever reads them must not take what happened here for a write into the state.
        """
        for counter in self._counters:
            counter.__exit__()

    def _now(self) -> list[int]:
        # the only witness of a write in place
        return [t._version for s in self._storages for t in s.seen if not t.is_inference()]

    def _put_back_containers(self) -> None:
        for empty in self._empty:
            if empty:
                _clear(empty)
        for held, keys, values in self._dicts:
            there = len(held) == len(keys) and all(map(is_, dict.values(held), values))
            if not (there and all(map(is_, dict.keys(held), keys))):
                _clear(held)
                (OrderedDict if isinstance(held, OrderedDict) else dict).update(held, zip(keys, values, strict=True))
        for sequence, items in self._sequences:
            if len(sequence) != len(items) or not all(map(is_, sequence, items)):
                sequence.clear()
                sequence.extend(items)

    def _walk(self, to_see: list[Found]) -> None:
        while to_see:
            path, thing = to_see.pop()
            if (
                (type(thing) in FAST and type(thing) is not tuple)
                or id(thing) in self._seen
                or isinstance(thing, PLAIN)
            ):
                continue
            self._seen[id(thing)] = thing
            if len(self._seen) > MOST_OBJECTS:
                msg = f"more than {MOST_OBJECTS} objects hang on the module, around {_words(path)}; to keep them all would take too long"
                raise CannotReplay(msg)
            to_see += self._look(path, thing)

    def _look(self, path: Path_, thing: Any) -> Iterable[Found]:
        if isinstance(thing, Tensor):
            return self._look_at_tensor(path, thing)
        if isinstance(thing, (dict, list, deque, set, tuple, frozenset)):
            return [*self._look_at_container(path, thing), *self._attributes(path, thing)]
        for kind, look in LOOKS:
            if isinstance(thing, kind):
                self._undo += look(thing)
                return self._attributes(path, thing)
        if isinstance(thing, nn.Module):
            return self._attributes(path, thing)
        if isinstance(thing, Iterator):
            msg = f"{_words(path)} is a {type(thing).__name__}: what it has handed out cannot be put back"
            raise CannotReplay(msg)
        return () if _is_machinery(type(thing).__module__) else self._attributes(path, thing)

    def _look_at_container(self, path: Path_, thing: Any) -> list[Found]:
        if not thing:
            if not isinstance(thing, (tuple, frozenset)):
                self._empty.append(thing)
            return []
        if isinstance(thing, dict):
            keys, values = tuple(dict.keys(thing)), tuple(dict.values(thing))
            self._dicts.append((thing, keys, values))
            return [((path, k, ".{}"), v) for k, v in zip(keys, values, strict=True) if type(v) not in FAST]
        if isinstance(thing, (list, deque)):
            self._sequences.append((thing, tuple(thing)))
        elif isinstance(thing, set):
            self._undo.append(partial(_refill, thing, tuple(thing)))
        return [((path, index, "[{}]"), item) for index, item in enumerate(thing)]

    def _look_at_tensor(self, path: Path_, tensor: Tensor) -> list[Found]:
        parts = _wrapped(tensor)
        if parts:
            return [((path, name, ".{}"), getattr(tensor, name)) for name in parts]
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return []
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._live.setdefault((str(storage.device), storage.data_ptr()), (storage, []))[1].append(tensor)
        self._tensors.append(_Place(tensor))
        return [((path, "grad", ".{}"), tensor.grad)] if tensor.is_leaf else []

    def _attributes(self, path: Path_, thing: object) -> list[Found]:
        """The attributes of an object, in its `__dict__` and its slots."""
        inside: list[Found] = []
        held = getattr(thing, "__dict__", None)
        if isinstance(held, dict) and held:
            found = self._look_at_container(path, held)
            inside = [pair for pair in found if pair[0][1] not in ATTRIBUTES_NOT_ENTERED]
        elif isinstance(held, dict):
            self._empty.append(held)
        kind: Any = type(thing)  # mypy takes object for something without a hash
        for name in _slots(kind):
            value = getattr(thing, name, _MISSING)
            self._undo.append(partial(_set_slot, thing, name, value))
            inside.append(((path, name, ".{}"), value))
        return inside

    def _check_memory(self) -> None:
        needed = sum(storage.nbytes() for storage, _ in self._live.values() if storage.device.type == "cpu")
        free = _free_memory() if needed > NOTHING_TO_SPEAK_OF else None
        if free is not None and needed > SHARE_OF_MEMORY * free:
            msg = (
                f"a copy of the module's state takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
            )
            raise CannotReplay(msg)


class _Place:
    """Where a tensor's memory lies, and what hangs on a leaf of the graph."""

    __slots__ = ("_alias", "_grad", "_is_leaf", "_layout", "_requires_grad", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._alias = tensor, tensor.detach()
        self._layout = tensor.data_ptr(), tensor.shape, tensor.stride()
        self._is_leaf = tensor.is_leaf
        self._requires_grad, self._grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def put_back(self) -> None:
        """Put the tensor back onto its own memory, should it have been given another (`p.data = ...`), and its gradient to it."""
        tensor = self._tensor
        if (tensor.data_ptr(), tensor.shape, tensor.stride()) != self._layout:
            tensor.data = self._alias
        if self._is_leaf:
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self._grad:
                tensor.grad = self._grad


def _words(path: Path_ | None) -> str:
    """The path as a person would write it."""
    parts: list[str] = []
    while path is not None:
        path, key, form = path
        parts.append(form.format(key) if isinstance(key, (str, int)) else f"[{type(key).__name__}]")
    return MACHINERY_OF_MODULES.sub("", "".join(reversed(parts)))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _copy_all(to: list[Tensor], source: list[Tensor]) -> None:
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in zip(to, source, strict=True):
        pair = groups.setdefault(one.device, ([], []))
        pair[0].append(one)
        pair[1].append(other)
    for live, kept in groups.values():
        torch._foreach_copy_(live, kept)


def _wrapped(tensor: Any) -> list[str]:
    """Names of the tensors inside a subclass that wraps others (a DTensor, a quantised weight)."""
    return list(tensor.__tensor_flatten__()[0]) if is_traceable_wrapper_subclass(tensor) else []


def _clear(container: Any) -> None:
    """With the methods of the base.

    A subclass may do more in its own, and dict's own would break the order of an OrderedDict.
    """
    kinds = (OrderedDict, dict, list, deque, set)
    next(kind for kind in kinds if isinstance(container, kind)).clear(container)


def _refill(thing: set[Any], before: tuple[Any, ...]) -> None:
    thing.clear()
    thing.update(before)


def _undo_array(thing: np.ndarray[Any, Any]) -> list[Undo]:
    if not thing.flags.writeable:
        return []
    before = thing.copy()

    def undo() -> None:
        thing[...] = before

    return [undo]


def _undo_bytes(thing: bytearray) -> list[Undo]:
    before = bytes(thing)

    def undo() -> None:
        thing[:] = before

    return [undo]


def _undo_random(thing: random.Random) -> list[Undo]:
    return [partial(thing.setstate, thing.getstate())]


def _undo_numpy_random(thing: np.random.Generator) -> list[Undo]:
    return _undo_bit_generator(thing.bit_generator)


def _undo_bit_generator(thing: np.random.BitGenerator) -> list[Undo]:
    return [partial(setattr, thing, "state", thing.state)]


def _undo_generator(thing: Any) -> list[Undo]:
    return [partial(thing.set_state, thing.get_state())]


LOOKS: Final[tuple[tuple[type | tuple[type, ...], Callable[[Any], list[Undo]]], ...]] = (
    (np.ndarray, _undo_array),
    (bytearray, _undo_bytes),
    (random.Random, _undo_random),
    (np.random.Generator, _undo_numpy_random),
    (np.random.BitGenerator, _undo_bit_generator),
    ((np.random.RandomState, torch.Generator), _undo_generator),
)


@cache
def _slots(kind: Any) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name not in ("__dict__", "__weakref__"):
                mangled = f"_{base.__name__.lstrip('_')}{name}"
                found.append(mangled if name.startswith("__") and not name.endswith("__") else name)
    return tuple(found)


def _set_slot(thing: object, name: str, value: object) -> None:
    if getattr(thing, name, _MISSING) is value:
        return
    if value is _MISSING:
        object.__delattr__(thing, name)
    else:
        object.__setattr__(thing, name, value)


_MISSING: Final = types.SimpleNamespace()


@cache
def _is_machinery(name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in NOT_ENTERED)


def _free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; `None` where the system does not tell (it does on Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)
