"""All faults, found by walking `faults/`: a new one is a new file there."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Final

from lightning_spike.testing import faults
from lightning_spike.testing.fault import Fault


def faults_for(cause: str) -> tuple[type[Fault], ...]:
    """The faults that should be diagnosed as this cause, by name; empty where the catalogue's cause has none."""
    return tuple(kind for kind in FAULTS if kind.cause == cause)


def _found() -> Iterator[type[Fault]]:
    for name in sorted(module.name for module in pkgutil.iter_modules(faults.__path__)):
        module = importlib.import_module(f"{faults.__name__}.{name}")
        for kind in vars(module).values():
            own = inspect.isclass(kind) and issubclass(kind, Fault) and kind.__module__ == module.__name__
            if own and not kind.__name__.startswith("_"):
                yield kind


_ALL: Final = sorted(_found(), key=lambda kind: kind.__name__)

FAULTS: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.cause is not None)
"""Every fault with a cause, by name."""
DECOYS: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.__module__.endswith(".decoys"))
"""Harmless oddities: nothing should be diagnosed."""
UNCOVERED: Final[tuple[type[Fault], ...]] = tuple(kind for kind in _ALL if kind.__module__.endswith(".uncovered"))
"""Faults that no cause of the catalogue covers: "unexplained" is the right answer."""
