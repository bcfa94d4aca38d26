"""Optimizer settings that change during training without a schedule: epsilon, betas, momentum, weight decay."""

import dataclasses
from typing import Final

from torch.optim import Optimizer

from lightning_spike.signals.learning_rate import plain_settings

CONSTANT_UPDATES: Final = 8
"""Updates that a setting must be constant before a change; a schedule such as OneCycleLR moves it at every update;
engineering choice."""
LEARNING_RATES: Final = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "swa_lr"})
"""Entries of a parameter group that have their own detector."""

Value = bool | int | float | str | tuple[bool | int | float | str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettingChange:
    """One setting, before and after."""

    group: int
    """Number of the parameter group, from 1 on."""
    name: str
    before: Value
    after: Value


class SettingChanges:
    """Compares an optimizer's host settings with those at its last update; ignores tensors."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int, str], tuple[Value, int]] = {}
        """By optimizer, group and name: the value, and for how many updates it is constant."""

    def of(self, optimizer: Optimizer) -> list[SettingChange]:
        """Changes of constant settings since the last call, once per update, just before it. Never blocks."""
        return [
            change
            for k, group in enumerate(optimizer.param_groups, start=1)
            for name, value in plain_settings(group).items()
            if name not in LEARNING_RATES and (change := self._compared((id(optimizer), k, name), value)) is not None
        ]

    def _compared(self, key: tuple[int, int, str], value: Value) -> SettingChange | None:
        before, constant = self._held.get(key, (value, 0))
        if value == before:
            self._held[key] = value, constant + 1
            return None
        self._held[key] = value, 1
        return (
            SettingChange(group=key[1], name=key[2], before=before, after=value)
            if constant >= CONSTANT_UPDATES
            else None
        )
