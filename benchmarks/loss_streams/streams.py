"""Synthetic loss streams with a known truth: healthy ones of many shapes, and the same with one fault in them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CLEAN", "EVENTS", "EVENT_NOISES", "LENGTH", "Event", "Floats"]

Floats: TypeAlias = npt.NDArray[np.float64]
Noise: TypeAlias = Callable[[Floats, np.random.Generator], Floats]

LENGTH: Final = 2000
AT: Final = 1200
"""Step of most events, as in the published comparison."""
RESTART_EVERY: Final = 250


def curve(length: int = LENGTH) -> Floats:
    """A language model's loss: 10.8 falling to 2.3."""
    return 2.3 + 8.5 * np.exp(-np.arange(length) / 150.0)


def gaussian(sigma: float) -> Noise:
    """Additive normal noise."""
    return lambda level, rng: level + rng.normal(0.0, sigma, len(level))


def lognormal(sigma: float) -> Noise:
    """Multiplicative noise with a heavy upper tail."""
    return lambda level, rng: level * rng.lognormal(0.0, sigma, len(level))


def student(scale: float, freedom: int = 3) -> Noise:
    """Additive noise with heavy tails on both sides."""
    return lambda level, rng: level + scale * rng.standard_t(freedom, len(level))


def heteroscedastic(first: float, last: float) -> Noise:
    """Additive normal noise that shrinks with a cosine learning rate."""

    def noisy(level: Floats, rng: np.random.Generator) -> Floats:
        share = 0.5 * (1.0 + np.cos(np.pi * np.arange(len(level)) / len(level)))
        return level + (last + (first - last) * share) * rng.normal(size=len(level))

    return noisy


def autoregressive(sigma: float, rho: float) -> Noise:
    """Additive normal noise that remembers: successive losses are alike."""

    def noisy(level: Floats, rng: np.random.Generator) -> Floats:
        noise = np.empty(len(level))
        noise[0] = rng.normal()
        for step in range(1, len(level)):
            noise[step] = rho * noise[step - 1] + math.sqrt(1.0 - rho * rho) * rng.normal()
        return level + sigma * noise

    return noisy


def _gamma(level: Floats, rng: np.random.Generator) -> Floats:
    return level * rng.gamma(2.0, 0.5, len(level))


def _low(level: Floats, rng: np.random.Generator) -> Floats:
    return 0.01 * rng.lognormal(0.0, 1.0, len(level))


def _negative(level: Floats, rng: np.random.Generator) -> Floats:
    return level - 6.0 + rng.normal(0.0, 0.1, len(level))


def _vanishing(level: Floats, rng: np.random.Generator) -> Floats:
    return 2.0 * np.exp(-np.arange(len(level)) / 150.0) * rng.lognormal(0.0, 0.4, len(level)) + 1e-6


def _restarts(level: Floats, rng: np.random.Generator) -> Floats:
    """Warm restarts: the loss climbs by 4 %, about twice the noise, and comes down with the rate."""
    since = np.arange(len(level)) % RESTART_EVERY
    bump = np.where(
        np.arange(len(level)) < RESTART_EVERY, 0.0, 0.06 * (1.0 - np.exp(-since / 10.0)) * np.exp(-since / 60.0)
    )
    return level * (1.0 + bump) + rng.normal(0.0, 0.05, len(level))


def _staircase(level: Floats, rng: np.random.Generator) -> Floats:
    """A step schedule: the loss drops and the noise shrinks at two points."""
    stair = np.repeat(
        [1.0, 0.6, 0.4], [len(level) // 2, len(level) // 4, len(level) - len(level) // 2 - len(level) // 4]
    )
    return (2.0 + 3.0 * np.exp(-np.arange(len(level)) / 100.0)) * stair * (1.0 + 0.05 * rng.normal(size=len(level)))


CLEAN: Final[dict[str, Noise]] = {
    "gaussian 0.02": gaussian(0.02),
    "gaussian 0.10": gaussian(0.10),
    "lognormal 0.1": lognormal(0.1),
    "lognormal 0.6": lognormal(0.6),
    "lognormal 1.0": lognormal(1.0),
    "student-t(3) 0.05": student(0.05),
    "student-t(4) 0.10": student(0.10, 4),
    "heteroscedastic": heteroscedastic(0.15, 0.02),
    "autoregressive 0.9": autoregressive(0.10, 0.9),
    "gamma(2)": _gamma,
    "low loss, lognormal": _low,
    "negative": _negative,
    "vanishing": _vanishing,
    "LR restarts, in range": _restarts,
    "LR staircase": _staircase,
}
EVENT_NOISES: Final[dict[str, Noise]] = {
    "gaussian 0.02": gaussian(0.02),
    "gaussian 0.10": gaussian(0.10),
    "lognormal 0.05": lognormal(0.05),
    "student-t(3) 0.05": student(0.05),
    "heteroscedastic": heteroscedastic(0.15, 0.02),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One fault with its truth."""

    name: str
    kind: str
    at: int
    within: int
    """Steps from `at` in which it has to be noticed."""
    apply: Callable[[Floats], Floats]
    rise: int | None = None
    """Steps that a slow rise takes; the onset may be off by 15 % of it."""
    period: int | None = None
    others: tuple[int, ...] = ()
    """Onsets of further troubles in the stream."""


def _times(at: int, factor: float, length: int = 1) -> Callable[[Floats], Floats]:
    def apply(loss: Floats) -> Floats:
        loss[at : at + length] *= factor
        return loss

    return apply


def _to(at: int, value: float) -> Callable[[Floats], Floats]:
    def apply(loss: Floats) -> Floats:
        loss[at] = value
        return loss

    return apply


def _both(first: Callable[[Floats], Floats], second: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    return lambda loss: second(first(loss))


def _diverge(loss: Floats) -> Floats:
    return loss * np.minimum(5.0, 1.02 ** np.maximum(0, np.arange(len(loss)) - AT + 1))


def _swing(loss: Floats) -> Floats:
    since = np.arange(len(loss)) - AT
    return loss * (1.0 + np.where(since >= 0, 0.3 * np.sin(2.0 * np.pi * (since + 1) / 12.0), 0.0))


def _stall(loss: Floats) -> Floats:
    """At step 300 the model stops learning; the noise goes on."""
    level = curve(len(loss))
    return np.where(np.arange(len(loss)) < STALL_AT, loss, loss - level + level[STALL_AT])


def _train(loss: Floats) -> Floats:
    loss[400::97] *= 2.0
    return loss


STALL_AT: Final = 300
EVENTS: Final = (
    Event(name="1-step x1.3", kind="spike", at=AT, within=20, apply=_times(AT, 1.3)),
    Event(name="1-step x2", kind="spike", at=AT, within=20, apply=_times(AT, 2.0)),
    Event(name="1-step x3.5", kind="spike", at=AT, within=20, apply=_times(AT, 3.5)),
    Event(name="10-step burst x1.5", kind="spike", at=AT, within=20, apply=_times(AT, 1.5, 10)),
    Event(name="slow divergence 2 %/step to x5", kind="divergence", at=AT, within=400, apply=_diverge, rise=81),
    Event(name="permanent step +40 %", kind="divergence", at=AT, within=20, apply=_times(AT, 1.4, LENGTH)),
    Event(name="single NaN", kind="nonfinite", at=AT, within=20, apply=_to(AT, math.nan)),
    Event(name="x5 at step 40", kind="spike", at=40, within=20, apply=_times(40, 5.0)),
    Event(
        name="x2, 30 steps after x50",
        kind="spike",
        at=AT,
        within=20,
        others=(AT - 30,),
        apply=_both(_times(AT - 30, 50.0), _times(AT, 2.0)),
    ),
    Event(
        name="x3.5, 30 steps after NaN",
        kind="spike",
        at=AT,
        within=20,
        others=(AT - 30,),
        apply=_both(_to(AT - 30, math.nan), _times(AT, 3.5)),
    ),
    Event(name="oscillation onset", kind="oscillation", at=AT, within=100, apply=_swing),
    Event(name="stall", kind="stall", at=STALL_AT, within=400, apply=_stall, rise=200),
    Event(
        name="periodic spikes",
        kind="spike",
        at=400,
        within=20,
        period=97,
        others=tuple(range(497, LENGTH, 97)),
        apply=_train,
    ),
)
