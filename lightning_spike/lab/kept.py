"""Keep the state of living objects, and put it back in place: every reference that others hold stays good.

A deep copy would not do: the optimizer, a logger or a callback may hold the very list, tensor or buffer that is to be put back. So what is kept is, for
every object that can be reached, what it held; putting back writes into the same object.
"""

import dataclasses
import random
import re
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_spike.lab.errors import CannotReplay

__all__ = ["Kept"]

MOST_OBJECTS: Final = 1_000_000
"""Objects to look at before giving up: about two seconds; a module that holds more is taken to hold a data set."""

SHARE_OF_MEMORY: Final = 0.5
"""Of the host memory that is free, the most that copies may take: an out-of-memory kill cannot be caught."""

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
"""Packages whose objects (other than modules) are machinery around the training: a training step does not keep state of its own there."""

ATTRIBUTES_NOT_ENTERED: Final = frozenset({"_trainer", "_fabric"})
"""Where a `LightningModule` holds who drives it."""

MACHINERY_OF_MODULES: Final = re.compile(r"\._(?:modules|parameters|buffers)(?=\.)")
"""Left out of the paths in messages."""

Undo: TypeAlias = Callable[[], object]
Look: TypeAlias = tuple[list[Undo], Iterable[tuple[str, object]]]


@dataclasses.dataclass(slots=True)
class _Storage:
    """The bytes under one or more tensors."""

    live: torch.UntypedStorage
    kept: torch.UntypedStorage | None = None

    def put_back(self) -> None:
        if self.kept is not None:
            self.live.copy_(self.kept, non_blocking=False)


class Kept:
    """What can be reached from some objects, as it is now.

    Followed are: modules (parameters, buffers that are persistent or not, gradients, modes, hooks, every attribute), lists, dicts, sets, deques, tensors,
    NumPy arrays, random generators, optimizers and any other object with attributes. Tensors are put back byte by byte, under all their views,
    without touching autograd's version counters. Not followed, so not put back: the cells of closures, globals, files, sparse tensors, and Lightning's own
    machinery.

    Takes one copy of every tensor, on its own device. Blocks.

    Args:
        roots: Where to begin, by the name that messages use.
        leave: Objects that are not followed.

    Raises:
        CannotReplay: Something can be reached that cannot be put back (an iterator, an open file), or there is too much of it.
    """

    def __init__(self, roots: Iterable[tuple[str, object]], *, leave: Iterable[object] = ()) -> None:
        self._left = tuple(leave)  # held, so that no id is used again
        self._seen: dict[int, object] = {id(thing): thing for thing in self._left}
        self._undo: list[Undo] = []
        self._storages: dict[tuple[str, int], _Storage] = {}
        self._walk(list(roots))
        self._check_memory()
        for storage in self._storages.values():
            storage.kept = storage.live.clone()  # type: ignore[no-untyped-call]

    def put_back(self) -> None:
        """Make everything as it was; may be called more than once. Blocks."""
        with torch.no_grad():
            for undo in self._undo:
                undo()
            for storage in self._storages.values():
                storage.put_back()

    def _walk(self, to_see: list[tuple[str, object]]) -> None:
        while to_see:
            path, thing = to_see.pop()
            if isinstance(thing, PLAIN) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            path = MACHINERY_OF_MODULES.sub("", path)
            if len(self._seen) > MOST_OBJECTS:
                msg = f"more than {MOST_OBJECTS} objects hang on the module, around {path}; to keep them all would take too long"
                raise CannotReplay(msg)
            undo, inside = self._look(path, thing)
            self._undo += undo
            to_see += [(name, item) for name, item in inside if not isinstance(item, PLAIN)]

    def _look(self, path: str, thing: object) -> Look:
        if isinstance(thing, Tensor):
            return self._look_at_tensor(path, thing)
        for kind, look in LOOKS:
            if isinstance(thing, kind):
                undo, inside = look(path, thing)
                own, own_inside = _attributes(path, thing)
                return [*undo, *own], [*inside, *own_inside]
        if isinstance(thing, nn.Module):
            return _attributes(path, thing)
        if isinstance(thing, Iterator):
            msg = f"{path} is a {type(thing).__name__}: what it has handed out cannot be put back"
            raise CannotReplay(msg)
        return ([], []) if _is_machinery(type(thing)) else _attributes(path, thing)

    def _look_at_tensor(self, path: str, tensor: Tensor) -> Look:
        parts = _wrapped(tensor)
        if parts:
            return [], [(f"{path}.{name}", getattr(tensor, name)) for name in parts]
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return [], []
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages.setdefault((str(storage.device), storage.data_ptr()), _Storage(storage))
        undo: list[Undo] = [_data_undo(tensor)]
        if not tensor.is_leaf:
            return undo, []
        return [*undo, _leaf_undo(tensor)], [(f"{path}.grad", tensor.grad)]

    def _check_memory(self) -> None:
        needed = sum(s.live.nbytes() for s in self._storages.values() if s.live.device.type == "cpu")
        free = _free_memory()
        if free is not None and needed > SHARE_OF_MEMORY * free:
            msg = (
                f"a copy of the module's state takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
            )
            raise CannotReplay(msg)


def _wrapped(tensor: Any) -> list[str]:  # noqa: ANN401 - mypy takes a Tensor that is a wrapper as well for impossible
    """Names of the tensors inside a subclass that wraps others (a DTensor, a quantised weight)."""
    return list(tensor.__tensor_flatten__()[0]) if is_traceable_wrapper_subclass(tensor) else []


def _data_undo(tensor: Tensor) -> Undo:
    """Put the tensor back onto its own memory, should it have been given another (`p.data = ...`)."""
    alias = tensor.detach()

    def undo() -> None:
        if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.stride() != alias.stride():
            tensor.data = alias

    return undo


def _leaf_undo(tensor: Tensor) -> Undo:
    requires_grad, grad = tensor.requires_grad, tensor.grad

    def undo() -> None:
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.grad is not grad:
            tensor.grad = grad

    return undo


def _look_at_dict(path: str, thing: dict[Any, Any]) -> Look:
    # The methods of the base: a subclass may do more in its own, and dict's own would break the order of an OrderedDict.
    base = OrderedDict if isinstance(thing, OrderedDict) else dict
    before = list(dict.items(thing))

    def undo() -> None:
        now = list(dict.items(thing))
        if len(now) != len(before) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, before, strict=True)):
            base.clear(thing)
            base.update(thing, before)

    return [undo], [(f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r:.40}]", v) for key, v in before]


def _look_at_sequence(path: str, thing: list[Any] | deque[Any]) -> Look:
    before = list(thing)

    def undo() -> None:
        if len(thing) != len(before) or any(a is not b for a, b in zip(thing, before, strict=True)):
            thing.clear()
            thing.extend(before)

    return [undo], [(f"{path}[{index}]", item) for index, item in enumerate(before)]


def _look_at_set(path: str, thing: set[Any]) -> Look:
    before = list(thing)

    def undo() -> None:
        thing.clear()
        thing.update(before)

    return [undo], [(f"{path}{{}}", item) for item in before]


def _look_at_fixed(path: str, thing: Iterable[Any]) -> Look:
    return [], [(f"{path}[{index}]", item) for index, item in enumerate(thing)]


def _look_at_array(path: str, thing: np.ndarray[Any, Any]) -> Look:  # noqa: ARG001 - all looks are called alike
    if not thing.flags.writeable:
        return [], []
    before = thing.copy()

    def undo() -> None:
        thing[...] = before

    return [undo], []


def _look_at_bytes(path: str, thing: bytearray) -> Look:  # noqa: ARG001 - all looks are called alike
    before = bytes(thing)

    def undo() -> None:
        thing[:] = before

    return [undo], []


def _look_at_random(path: str, thing: random.Random) -> Look:  # noqa: ARG001 - all looks are called alike
    before = thing.getstate()
    return [lambda: thing.setstate(before)], []


def _look_at_numpy_random(path: str, thing: np.random.Generator) -> Look:
    return _look_at_bit_generator(path, thing.bit_generator)


def _look_at_bit_generator(path: str, thing: np.random.BitGenerator) -> Look:  # noqa: ARG001 - all looks are called alike
    before = thing.state
    return [lambda: setattr(thing, "state", before)], []


def _look_at_numpy_legacy(path: str, thing: np.random.RandomState) -> Look:  # noqa: ARG001 - all looks are called alike
    before = thing.get_state()
    return [lambda: thing.set_state(before)], []


def _look_at_torch_random(path: str, thing: torch.Generator) -> Look:  # noqa: ARG001 - all looks are called alike
    before = thing.get_state()
    return [lambda: thing.set_state(before)], []


LOOKS: Final[tuple[tuple[type | tuple[type, ...], Callable[[str, Any], Look]], ...]] = (
    (dict, _look_at_dict),
    ((list, deque), _look_at_sequence),
    (set, _look_at_set),
    ((tuple, frozenset), _look_at_fixed),
    (np.ndarray, _look_at_array),
    (bytearray, _look_at_bytes),
    (random.Random, _look_at_random),
    (np.random.Generator, _look_at_numpy_random),
    (np.random.BitGenerator, _look_at_bit_generator),
    (np.random.RandomState, _look_at_numpy_legacy),
    (torch.Generator, _look_at_torch_random),
)


def _attributes(path: str, thing: object) -> Look:
    """The attributes of an object, in its `__dict__` and its slots."""
    undo: list[Undo] = []
    inside: list[tuple[str, object]] = []
    held = getattr(thing, "__dict__", None)
    if isinstance(held, dict):
        undo, named = _look_at_dict(path, held)
        inside = [pair for pair in named if pair[0].rpartition(".")[2] not in ATTRIBUTES_NOT_ENTERED]
    for name in _slots(type(thing)):
        value = getattr(thing, name, _MISSING)
        undo.append(partial(_set_slot, thing, name, value))
        inside.append((f"{path}.{name}", value))
    return undo, inside


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name not in ("__dict__", "__weakref__"):
                mangled = f"_{base.__name__.lstrip('_')}{name}"
                yield mangled if name.startswith("__") and not name.endswith("__") else name


def _set_slot(thing: object, name: str, value: object) -> None:
    if getattr(thing, name, _MISSING) is value:
        return
    if value is _MISSING:
        object.__delattr__(thing, name)
    else:
        object.__setattr__(thing, name, value)


_MISSING: Final = types.SimpleNamespace()


def _is_machinery(kind: type) -> bool:
    name = kind.__module__
    return any(name == package or name.startswith(f"{package}.") for package in NOT_ENTERED)


def _free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; `None` where the system does not tell (it does on Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)
