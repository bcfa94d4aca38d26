"""Snapshot of live objects, restored in place so that all references to them stay valid.

A deep copy does not suffice: the optimizer, a logger or a callback can hold the same list, tensor or buffer. The
snapshot keeps the content of every reachable object and writes it back into the same object.
"""

import dataclasses
import re
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from operator import is_, setitem
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_spike.errors import CannotReplay
from lightning_spike.record.attribute_state import FAST, PLAIN, generator_state, refill, set_generator_state, slots_of

MAX_OBJECTS: Final = 1_000_000
"""Objects that are visited, about two seconds; a module with more is taken to hold a data set; engineering choice."""

MAX_MEMORY_SHARE: Final = 0.5
"""Largest share of the free host memory for copies: an out-of-memory kill cannot be caught; engineering choice."""

UNCHECKED_BYTES: Final = 1 << 26
"""Bytes that are copied without reading the free memory, which takes half a millisecond; engineering choice."""

IMMUTABLE: Final = (
    *(*PLAIN, type, np.dtype, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(types.CodeType, weakref.ReferenceType),
)
"""Types that cannot change, or whose changes cannot be undone (the cells of a closure)."""

NOT_ENTERED: Final = (
    *("lightning", "pytorch_lightning", "lightning_spike", "torch.utils.data", "torch._dynamo", "torch._inductor"),
    *("torch.distributed", "logging", "threading", "_thread", "multiprocessing", "concurrent", "asyncio", "socket"),
    "weakref",
)
"""Packages whose objects (other than modules) surround the training: a training step keeps no state there."""

ATTRIBUTES_NOT_ENTERED: Final = frozenset({"_trainer", "_fabric"})
"""Attributes in which a `LightningModule` holds its trainer."""

MACHINERY_OF_MODULES: Final = re.compile(r"\._(?:modules|parameters|buffers)(?=\.)")
"""Left out of the paths in messages."""

NOT_FOLLOWED: Final = FAST | {types.FunctionType, type}
"""Types of nearly all objects; a look-up is cheaper than an `isinstance`."""

Undo: TypeAlias = Callable[[], object]
Path_: TypeAlias = tuple["Path_ | None", object, str]
"""Where an object was found: the path of its holder, the key in it, and how that is written."""
Found: TypeAlias = tuple[Path_, object]


@dataclasses.dataclass(slots=True, eq=False)
class _Storage:
    """The bytes under one or more tensors."""

    live: Tensor
    """A uint8 view of its own: writing into it leaves autograd's version counters of the tensors alone."""
    kept: Tensor
    seen: list[Tensor]


class ObjectSnapshot:
    """State of everything that can be reached from some objects.

    Follows modules (parameters, buffers that are persistent or not, gradients, modes, hooks, every attribute),
    lists, dicts, sets, deques, tensors, NumPy arrays, random generators, optimizers and any other object with
    attributes. Tensors are put back byte by byte, under all their views, without touching autograd's version counters.
    Not followed, so not restored: the cells of closures, globals, files, sparse tensors, and Lightning's own machinery.

    Takes one copy of every tensor, on its own device. Blocks.

    Args:
        roots: Where to begin, by the name that messages use.
        leave: Objects that are not followed.

    Raises:
        CannotReplay: A reachable object cannot be restored (an iterator, an open file), or there are too many.
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
        """Restore everything; can be called repeatedly. Blocks.

        Args:
            trusting: Skip the copy if autograd's version counters of the tensors have not changed: for tensors that
                only known operations write. Writes through `.data` or by a foreign kernel do not count.
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
        """Restore autograd's version counters at the end, so that nobody takes our writes for changes of the state."""
        for counter in self._counters:
            counter.__exit__()

    def _now(self) -> list[int]:
        # the only witness of a write in place
        return [t._version for s in self._storages for t in s.seen if not t.is_inference()]

    def _put_back_containers(self) -> None:
        for empty in self._empty:
            if empty:
                refill(empty, ())
        for held, keys, values in self._dicts:
            there = len(held) == len(keys) and all(map(is_, dict.values(held), values))
            if not (there and all(map(is_, dict.keys(held), keys))):
                refill(held, zip(keys, values, strict=True))
        for sequence, items in self._sequences:
            if len(sequence) != len(items) or not all(map(is_, sequence, items)):
                refill(sequence, items)

    def _walk(self, to_see: list[Found]) -> None:
        while to_see:
            path, thing = to_see.pop()
            if type(thing) in NOT_FOLLOWED or id(thing) in self._seen or isinstance(thing, IMMUTABLE):
                continue
            self._seen[id(thing)] = thing
            if len(self._seen) > MAX_OBJECTS:
                msg = f"the module holds more than {MAX_OBJECTS:,} objects (around {_words(path)}), too many to copy"
                raise CannotReplay(msg)
            to_see += self._look(path, thing)

    def _look(self, path: Path_, thing: Any) -> Iterable[Found]:
        if isinstance(thing, Tensor):
            return self._look_at_tensor(path, thing)
        if isinstance(thing, (dict, list, deque, set, tuple, frozenset)):
            return [*self._look_at_container(path, thing), *self._attributes(path, thing)]
        if (undo := _undo(thing)) is not None or isinstance(thing, nn.Module):
            self._undo += [undo] if undo is not None else []
            return self._attributes(path, thing)
        if isinstance(thing, Iterator):
            msg = f"{_words(path)} is a {type(thing).__name__}: the items it has returned cannot be put back"
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
            return [((path, k, ".{}"), v) for k, v in zip(keys, values, strict=True) if type(v) not in NOT_FOLLOWED]
        if isinstance(thing, (list, deque)):
            self._sequences.append((thing, tuple(thing)))
        elif isinstance(thing, set):
            self._undo.append(partial(refill, thing, tuple(thing)))
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
        for name in slots_of(kind):
            value = getattr(thing, name, _MISSING)
            self._undo.append(partial(_set_slot, thing, name, value))
            inside.append(((path, name, ".{}"), value))
        return inside

    def _check_memory(self) -> None:
        needed = sum(storage.nbytes() for storage, _ in self._live.values() if storage.device.type == "cpu")
        free = _free_memory() if needed > UNCHECKED_BYTES else None
        if free is not None and needed > MAX_MEMORY_SHARE * free:
            msg = (
                f"a copy of the module's state takes {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB of memory are free"
            )
            raise CannotReplay(msg)


class _Place:
    """Memory layout of a tensor, and gradient of a leaf."""

    __slots__ = ("_alias", "_grad", "_is_leaf", "_layout", "_requires_grad", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._alias = tensor, tensor.detach()
        self._layout = tensor.data_ptr(), tensor.shape, tensor.stride()
        self._is_leaf = tensor.is_leaf
        self._requires_grad, self._grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def put_back(self) -> None:
        """Restore the tensor's memory (after `p.data = ...`), `requires_grad` and gradient."""
        tensor = self._tensor
        if (tensor.data_ptr(), tensor.shape, tensor.stride()) != self._layout:
            tensor.data = self._alias
        if self._is_leaf:
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self._grad:
                tensor.grad = self._grad


def _words(path: Path_ | None) -> str:
    """The path as Python code."""
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
    """Attribute names of the tensors inside a wrapper subclass (a DTensor, a quantised weight)."""
    return list(tensor.__tensor_flatten__()[0]) if is_traceable_wrapper_subclass(tensor) else []


def _undo(thing: Any) -> Undo | None:
    """What restores an array, byte array or random generator; `None` for any other object."""
    if isinstance(thing, np.ndarray):
        return partial(np.copyto, thing, thing.copy()) if thing.flags.writeable else None
    if isinstance(thing, bytearray):
        return partial(setitem, thing, slice(None), bytes(thing))
    state = generator_state(thing)
    return None if state is None else partial(set_generator_state, thing, state)


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
    """Bytes of host memory available without swapping; `None` where unknown (other than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)
