"""Finds the causes: every file of `causes/`, and what other packages offer under an entry point."""

import importlib
import inspect
import pkgutil
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from lightning_spike.diagnosis import causes
from lightning_spike.diagnosis.cause import Cause

ENTRY_POINTS: Final = "lightning_spike.causes"
"""The group under which other packages offer causes: a module with `Cause` classes in it, or a class."""


def catalogue() -> tuple[Cause, ...]:
    """One instance of every cause that is known, ours first, each by name; a cause of another package with one of our ids takes its place.

    An entry point that cannot be loaded is passed over with a warning: somebody else's package must not cost the user the report. Imports modules;
    otherwise does not block.
    """
    found: dict[str, Cause] = {}
    for kind in (*_own(), *_offered()):
        found[kind.id] = kind()
    return tuple(found.values())


def _own() -> Iterator[type[Cause]]:
    for name in sorted(module.name for module in pkgutil.iter_modules(causes.__path__)):
        yield from _classes(importlib.import_module(f"{causes.__name__}.{name}"))


def _offered() -> Iterator[type[Cause]]:
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        try:
            yield from _usable(entry)
        except Exception as error:  # noqa: BLE001 - whatever another package does at import, the report comes out
            message = f"lightning_spike: the cause {entry.name!r} ({entry.value}) cannot be used: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=2)


def _usable(entry: EntryPoint) -> list[type[Cause]]:
    """The classes that an entry point offers.

    Raises:
        TypeError: There are none, or one lacks what a cause must have.
    """
    loaded = entry.load()
    classes = list(_classes(loaded)) if isinstance(loaded, types.ModuleType) else [loaded]
    if not classes:
        msg = "there is no subclass of lightning_spike.diagnosis.cause.Cause in it"
        raise TypeError(msg)
    for kind in classes:
        if not (inspect.isclass(kind) and issubclass(kind, Cause)) or inspect.isabstract(kind):
            msg = f"{kind!r} is no complete subclass of lightning_spike.diagnosis.cause.Cause"
            raise TypeError(msg)
        missing = [name for name in ("id", "family", "title") if not hasattr(kind, name)]
        if missing:
            msg = f"{kind.__name__} has no {', '.join(missing)}"
            raise TypeError(msg)
    return classes


def _classes(module: types.ModuleType) -> Iterator[type[Cause]]:
    """The causes that a module itself defines."""
    for kind in vars(module).values():
        if (
            inspect.isclass(kind)
            and issubclass(kind, Cause)
            and kind.__module__ == module.__name__
            and not inspect.isabstract(kind)
        ):
            yield kind
