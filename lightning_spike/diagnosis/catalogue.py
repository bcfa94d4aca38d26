"""Finds the causes: every file of `causes/`, and those of other packages under an entry point."""

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
    """Every known cause, by id, those of this package first; imports modules.

    A cause of another package replaces ours with the same id. An entry point that cannot be loaded gives a warning and
    is left out, so that the user still gets the report.
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
            source = f"the cause {entry.name!r} ({entry.value})"
            message = f"lightning_spike: {source} cannot be used: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=2)


def _usable(entry: EntryPoint) -> list[Cause]:
    """The causes of an entry point.

    Raises:
        TypeError: It holds none.
    """
    loaded = entry.load()
    found = _records(loaded) if isinstance(loaded, types.ModuleType) else [loaded]
    if not found or not all(isinstance(cause, Cause) for cause in found):
        msg = f"expected a lightning_spike.diagnosis.cause.Cause or a module with some, got {loaded!r}"
        raise TypeError(msg)
    return found


def _records(module: types.ModuleType) -> list[Cause]:
    return [value for value in vars(module).values() if isinstance(value, Cause)]
