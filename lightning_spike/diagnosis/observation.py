"""What an observation is: a level, the numbers behind it, and a sentence; and the function that makes one.

An observer looks at one episode and returns the one of its *levels* that holds, or nothing. It knows no weights: what a
level weighs for a cause stands in `weights.json`. So one observer serves many causes, and weights can be fitted.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis.view import EpisodeView

Observe = Callable[[EpisodeView], "Observation | None"]
AT_ONSET: Final = -1
"""Stands for the step of the onset, which is not negative; by definition."""


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """One thing that was seen about an episode; its `Observer` fills in what is left out."""

    text: str
    """One sentence with the numbers in it, for a person."""
    _: dataclasses.KW_ONLY
    level: str = ""
    """One of its observer's levels, by default the only one; what it weighs for a cause stands in `weights.json`."""
    signal: str = ""
    """The recorded series or experiment that it comes from; by default the observer's, else the episode's loss."""
    step: int | None = AT_ONSET
    """Where it was seen; `None` for a setting of the whole run."""
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
    signal: str = ""
    """What its observations come from where they do not say."""

    def __call__(self, view: EpisodeView) -> Observation | None:
        """Look at one episode."""
        found = self.observe(view)
        if found is None:
            return None
        return dataclasses.replace(
            found,
            level=found.level or self.levels[0],
            signal=found.signal or self.signal or view.episode.signal,
            step=view.step if found.step == AT_ONSET else found.step,
        )


def observer(*levels: str, name: str | None = None, signal: str = "") -> Callable[[Observe], Observer]:
    """Make an `Observer` of a function.

    Args:
        levels: Every level that the function can give; a test holds `weights.json` against them.
        name: Its name in `weights.json` and in the evidence; the function's own name by default.
        signal: The series or experiment that it looks at.
    """
    return lambda observe: Observer(name or observe.__name__.removeprefix("_"), levels, observe, signal)


def first_of(name: str, *observers: Observer) -> Observer:
    """Combine observers: the first observation that one of them makes counts, with the levels of all of them."""

    def observe(view: EpisodeView) -> Observation | None:
        return next((found for one in observers if (found := one(view)) is not None), None)

    return Observer(name, tuple(dict.fromkeys(level for one in observers for level in one.levels)), observe)


def only_if(holds: Callable[[EpisodeView], bool], one: Observer, name: str | None = None) -> Observer:
    """Restrict an observer to the episodes for which a condition holds.

    Args:
        holds: The condition.
        one: The observer.
        name: Another name for it in `weights.json`.
    """
    return dataclasses.replace(one, name=name or one.name, observe=lambda view: one(view) if holds(view) else None)


def premise(
    name: str, holds: Callable[[EpisodeView], bool], level: str, text: str, *, signal: str, step: int | None = AT_ONSET
) -> Observer:
    """Make the observer of a premise, for `Cause.requires`: it gives an observation where the premise does not hold.

    Args:
        name: Its name in `weights.json`.
        holds: Whether the premise holds.
        level: Its only level.
        text: One sentence for a person.
        signal: The series or experiment that it looks at.
        step: As in `Observation`.
    """
    return Observer(name, (level,), lambda view: None if holds(view) else Observation(text, step=step), signal)
