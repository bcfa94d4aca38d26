"""Finds the causes: every file of `causes/`, and what other packages offer under an entry point."""

import importlib
import pkgutil
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from lightning_spike.diagnosis import causes
from lightning_spike.diagnosis.cause import Cause

ENTRY_POINTS: Final = "lightning_spike.causes"
"""The group under which other packages offer causes: a module with `Cause` records in it, or one record."""


def catalogue() -> tuple[Cause, ...]:
    """Every cause that is known, ours first, each by name.

    A cause of another package with one of our ids takes its place.

    An entry point that cannot be loaded is passed over with a warning: another package must not cost the user the
    report. Imports modules; otherwise does not block.
    """
    found = {cause.id: cause for cause in (*_own(), *_offered())}
    return tuple(found.values())


def _own() -> Iterator[Cause]:
    for name in sorted(module.name for module in pkgutil.iter_modules(causes.__path__)):
        yield from _records(importlib.import_module(f"{causes.__name__}.{name}"))


def _offered() -> Iterator[Cause]:
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        try:
            yield from _usable(entry)
        except Exception as error:  # noqa: BLE001 - whatever another package does at import, the report comes out
            message = f"lightning_spike: the cause {entry.name!r} ({entry.value}) cannot be used: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=2)


def _usable(entry: EntryPoint) -> list[Cause]:
    """The causes that an entry point offers.

    Raises:
        TypeError: There are none.
    """
    loaded = entry.load()
    found = _records(loaded) if isinstance(loaded, types.ModuleType) else [loaded]
    if not found or not all(isinstance(cause, Cause) for cause in found):
        msg = f"expected a lightning_spike.diagnosis.cause.Cause or a module with some, got {loaded!r}"
        raise TypeError(msg)
    return found


def _records(module: types.ModuleType) -> list[Cause]:
    return [value for value in vars(module).values() if isinstance(value, Cause)]
