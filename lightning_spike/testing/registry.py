"""Lists all faults: those in the files of `faults/`, and those of other packages' entry points."""

import importlib
import inspect
import pkgutil
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Final

from lightning_spike.testing import faults
from lightning_spike.testing.fault import Fault

ENTRY_POINTS: Final = "lightning_spike.faults"
"""The group under which other packages offer faults: modules with `Fault` subclasses in them."""


def faults_for(cause: str) -> tuple[type[Fault], ...]:
    """The faults whose expected cause is this one, by name."""
    return tuple(kind for kind in FAULTS if kind.cause == cause)


def _found() -> Iterator[type[Fault]]:
    for name in sorted(module.name for module in pkgutil.iter_modules(faults.__path__)):
        yield from _faults_in(importlib.import_module(f"{faults.__name__}.{name}"))
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        try:
            yield from _faults_in(entry.load())
        except Exception as error:  # noqa: BLE001 - another package must not cost the user ours
            warnings.warn(f"lightning_spike: the faults {entry.value!r} cannot be used: {error}", stacklevel=2)


def _faults_in(module: types.ModuleType) -> list[type[Fault]]:
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Fault)]
    return [kind for kind in kinds if kind.__module__ == module.__name__ and not kind.__name__.startswith("_")]


_ALL: Final = sorted(_found(), key=lambda kind: kind.__name__)

FAULTS: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.cause is not None)
"""Every fault with a cause, by name."""
DECOYS: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.__module__.endswith(".decoys"))
"""Harmless oddities: nothing should be diagnosed."""
UNCOVERED: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.__module__.endswith(".uncovered"))
"""Faults that no cause of the catalogue covers: "unexplained" is the right answer."""
