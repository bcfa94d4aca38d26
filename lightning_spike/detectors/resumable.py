"""State dicts of the detectors, made from the names of their attributes."""

import copy
from collections import deque
from typing import Any, ClassVar

from lightning_spike.rolling import LazyWindow, SortedWindow


class Resumable:
    """Saves and restores the attributes that `STATE` names."""

    __slots__ = ()
    STATE: ClassVar[tuple[str, ...]] = ()
    """Attributes with JSON-able values, windows or other `Resumable` objects."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able copy of the state."""
        return {name.lstrip("_"): _saved(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        for name in self.STATE:
            held, value = getattr(self, name), copy.deepcopy(state[name.lstrip("_")])
            if isinstance(held, Resumable):
                held.load_state_dict(value)
            elif isinstance(held, LazyWindow | SortedWindow):
                held.replace(value)
            elif isinstance(held, deque):
                held.clear()
                held.extend(value)
            else:
                setattr(self, name, value)


def _saved(value: object) -> Any:
    if isinstance(value, Resumable):
        return value.state_dict()
    if isinstance(value, LazyWindow | SortedWindow):
        return value.values()
    return list(value) if isinstance(value, deque) else copy.deepcopy(value)
