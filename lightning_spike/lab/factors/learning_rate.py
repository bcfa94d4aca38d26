"""The learning rate: would the recent one have done the same?"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import Tensor
from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import PLACE, Settings, Update

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
        usual = [_usual_rates(step, around.settings) for step in update.settings]
        if not any(_is_changed(step, rates) for step, rates in zip(update.settings, usual, strict=True)):
            return None
        settings = tuple(_with_rates(step, rates) for step, rates in zip(update.settings, usual, strict=True))
        return dataclasses.replace(update, settings=settings)


def _usual_rates(step: Settings, before: Sequence[Settings]) -> list[float]:
    """The median rate of every parameter group in the steps of the same optimizer; the step's own where these are too few."""
    own = [_rate(group) for group in step]
    like = [other for other in before if _place(other) == _place(step) and len(other) == len(step)]
    return (
        own if len(like) < FEWEST else [statistics.median(_rate(other[k]) for other in like) for k in range(len(own))]
    )


def _with_rates(step: Settings, rates: Sequence[float]) -> Settings:
    return [{**group, "lr": rate} if "lr" in group else group for group, rate in zip(step, rates, strict=True)]


def _is_changed(step: Settings, usual: Sequence[float]) -> bool:
    return any(not (rate / CHANGED <= _rate(group) <= rate * CHANGED) for group, rate in zip(step, usual, strict=True))


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr", 0.0)
    return float(rate) if isinstance(rate, int | float | Tensor) else 0.0


def _place(step: Settings) -> object:
    return step[0].get(PLACE) if step else None
