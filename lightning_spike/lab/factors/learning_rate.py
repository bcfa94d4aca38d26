"""The learning rate: would the recent one have done the same?"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import Tensor
from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import Settings, Update

__all__ = ["LearningRate"]

CHANGED: Final = 1.05
"""Factor from the recent median in either direction up to which a rate is what it was: smooth schedules move by less in 32 steps, or matter little."""
FEWEST: Final = 4
"""Steps without which there is no recent rate."""


class LearningRate(Factor):
    """The rate that the update was made with, against the median of the steps before."""

    id: ClassVar = "learning_rate"
    group: ClassVar = "learning_rate"
    title: ClassVar = "the learning rate"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        usual = usual_rates(around.settings)
        now = [[_rate(group) for group in settings] for settings in update.settings]
        if usual is None or not any(
            _is_changed(rate, ref) for rates in now for rate, ref in zip(rates, usual, strict=False)
        ):
            return None
        settings = tuple(_with_rates(settings, usual) for settings in update.settings)
        return dataclasses.replace(update, settings=settings)


def usual_rates(settings: Sequence[Settings]) -> list[float] | None:
    """The median rate of every parameter group; `None` for too few steps."""
    if len(settings) < FEWEST:
        return None
    groups = min(len(step) for step in settings)
    return [statistics.median(_rate(step[k]) for step in settings) for k in range(groups)]


def _with_rates(settings: Settings, rates: Sequence[float]) -> Settings:
    return [{**group, "lr": rate} for group, rate in zip(settings, rates, strict=False)]


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr", 0.0)
    return float(rate) if isinstance(rate, int | float | Tensor) else 0.0


def _is_changed(rate: float, usual: float) -> bool:
    return not (usual / CHANGED <= rate <= usual * CHANGED)
