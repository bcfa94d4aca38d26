"""What an observation is: a level, the numbers behind it, and a sentence; and the function that makes one.

An observer looks at one episode and says which of its *levels* holds, or nothing where it cannot tell. It knows no
weights: what a level weighs for a cause stands in `weights.json`, so one observer serves many causes, and weights can
be fitted.
"""

import dataclasses
from collections.abc import Callable

from lightning_spike.diagnosis.view import EpisodeView

Observe = Callable[[EpisodeView], "Observation | None"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One thing that was seen about an episode."""

    level: str
    """One of its observer's levels; what it weighs for a cause stands in `weights.json`."""
    text: str
    """One sentence with the numbers in it, for a person."""
    signal: str
    """The recorded series or experiment that it comes from, as in `Evidence.signal`."""
    step: int | None = None
    observed: float | None = None
    expected: float | None = None
    confirms: bool | None = None
    """What an experiment on this very cause says: it is the cause, it is not, or (`None`) no experiment decides. Set by
    `judgement` alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Observer:
    """A named observation function with the levels that it can give."""

    name: str
    levels: tuple[str, ...]
    observe: Observe

    def __call__(self, view: EpisodeView) -> Observation | None:
        """Look at one episode."""
        return self.observe(view)


def observer(*levels: str, name: str | None = None) -> Callable[[Observe], Observer]:
    """Make an `Observer` of a function.

    Args:
        levels: Every level that the function can give; a test holds `weights.json` against them.
        name: Its name in `weights.json` and in the evidence; the function's own name by default.
    """

    def named(observe: Observe) -> Observer:
        return Observer(name or observe.__name__.removeprefix("_"), levels, observe)

    return named


def first_of(name: str, *observers: Observer) -> Observer:
    """An observer that gives the first observation that one of several makes; the levels are those of all of them."""

    def observe(view: EpisodeView) -> Observation | None:
        return next((found for one in observers if (found := one(view)) is not None), None)

    return Observer(name, tuple(dict.fromkeys(level for one in observers for level in one.levels)), observe)
