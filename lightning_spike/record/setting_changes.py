"""Settings of an optimizer that change while training runs, though no schedule moves them.

Epsilon, betas, momentum, weight decay.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from torch.optim import Optimizer

STOOD: Final = 8
"""Updates that a setting must have stood still for: what moves with every update (OneCycleLR turns momentum and betas)
is a schedule's."""
NOT_SETTINGS: Final = frozenset({"params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr"})
"""Of a parameter group; learning rates have detectors of their own."""
PLAIN: Final = (bool, int, float, str)

Value = bool | int | float | str | tuple[bool | int | float | str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettingChange:
    """One setting, before and after."""

    group: int
    """Of the parameter groups, from 1 on, as in the names of learning rates."""
    name: str
    before: Value
    after: Value


class SettingChanges:
    """Compares an optimizer's settings with those of its update before.

    Looks at numbers on the host only; a setting that is a tensor is passed over.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int, str], tuple[Value, int]] = {}
        """By optimizer, group and name: the value, and for how many updates it has stood."""

    def of(self, optimizer: Optimizer) -> list[SettingChange]:
        """What has changed since the last call, of the settings that had stood still.

        To be asked once for every update, just before it. Never blocks.
        """
        return [
            change
            for k, group in enumerate(optimizer.param_groups, start=1)
            for name, value in _settings(group)
            if (change := self._compared((id(optimizer), k, name), value)) is not None
        ]

    def _compared(self, key: tuple[int, int, str], value: Value) -> SettingChange | None:
        before, stood = self._held.get(key, (value, 0))
        if value == before:
            self._held[key] = value, stood + 1
            return None
        self._held[key] = value, 1
        return SettingChange(group=key[1], name=key[2], before=before, after=value) if stood >= STOOD else None


def _settings(group: Mapping[str, Any]) -> list[tuple[str, Value]]:
    out: list[tuple[str, Value]] = []
    for name, value in group.items():
        if name in NOT_SETTINGS or name.startswith("_"):
            continue
        if isinstance(value, PLAIN):
            out.append((name, value))
        elif isinstance(value, (tuple, list)) and all(isinstance(v, PLAIN) for v in value):
            out.append((name, tuple(value)))
    return out
