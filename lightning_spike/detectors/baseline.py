"""How far a value lies outside the recent accepted values of its series.

One ruler for every series: loss, gradient norm, update size. A value is compared with the median of the last 32 accepted ones;
the difference is taken on a logarithmic scale (or, once the series has been negative, on a plain one), so that noise that is
proportional to the level has one size along a falling curve. Its unit is the upper half-width of the noise, and how far out is
far is read off the tail that the series itself has shown.
"""

import math
from typing import Any, Final

from lightning_spike.rolling import SortedWindow, quantile

__all__ = ["Baseline"]

CENTRE: Final = 32
"""Accepted values that make the present level: its median then adds 2.4 % to the noise, and follows a trend within 16 steps."""
SCALE: Final = 256
"""Residuals that make the present noise."""
TAIL: Final = 1024
"""Standardised residuals that show how heavy the tail is."""
LEAST: Final = 8
"""Accepted values without which no statement is made."""
OFFSET: Final = 0.25
"""Share of the median that is added before the logarithm: science.md 1.5 measured c = 0.25 median as the best of its kind."""
REFIT_EVERY: Final = 16
"""Pushes between two looks at the tail; amortises its cost."""
NORMAL_LIMIT: Final = 4.2
"""How far out is far for normal noise, in standard deviations: 8.5e-6 of the values lie beyond."""
TAIL_POINTS: Final = ((0.95, 1.6449), (0.975, 1.96), (0.99, 2.3263))
"""Probabilities at which the tail is read, with the normal quantile of each."""
ONE_SIGMA: Final = 0.8413
"""Phi(1): the upper half-width of normal noise is its standard deviation."""
HEAVIEST: Final = 0.30
"""Cap on the tail's shape h; Student's t with 2 degrees of freedom has about as much between these quantiles."""
SCALE_POINTS: Final = ((0.75, 0.6745), (0.8413, 1.0), (0.90, 1.2816))
"""Probabilities whose half-widths are averaged into the scale, with the normal quantile of each."""
HUGE: Final = 1e300
"""Values are cut here, so that differences stay finite."""


def _shape(ordered: list[float]) -> float:
    """Tail shape h of Tukey's g-and-h family: a quantile at normal score z is stretched by exp(h z^2 / 2)."""
    one = quantile(ordered, ONE_SIGMA)
    if one <= 0.0:
        return HEAVIEST
    shapes = [
        2.0 * math.log(max(quantile(ordered, probability), 1e-12) / (one * score)) / (score * score - 1.0)
        for probability, score in TAIL_POINTS
    ]
    return sum(shapes) / len(shapes)


class Baseline:
    """Recent accepted values of one series, and the ruler they make.

    `score` says how far out a value is, `limit` how far out is too far, `push` accepts a value. Ten microseconds for the three.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._centre = SortedWindow(CENTRE)
        self._before = SortedWindow(CENTRE)
        self._residuals = SortedWindow(SCALE)
        self._tail = SortedWindow(TAIL)
        self._linear = False
        self._pushed = 0
        self._limit = math.inf
        self._scale = math.inf

    @property
    def ready(self) -> bool:
        """Enough values have been accepted to judge one."""
        return len(self._residuals) >= LEAST

    @property
    def level(self) -> float | None:
        """Median of the last 32 accepted values; `None` before the first."""
        return self._centre.median() if len(self._centre) else None

    @property
    def limit(self) -> float:
        """Score beyond which a value does not belong to the noise; infinite until the baseline is ready."""
        return self._limit

    @property
    def spread(self) -> float:
        """The noise's upper half-width in the units of the series, at the present level; infinite until ready."""
        if not self.ready:
            return math.inf
        return self._scale if self._linear else math.expm1(min(self._scale, 600.0)) * self._unit(self._centre.median())

    def score(self, value: float, noise: float = 1.0) -> float:
        """Robust standard deviations above (+) or below (-) the recent level; 0.0 until ready.

        Args:
            value: A finite number.
            noise: How many times noisier than usual this value is, sqrt(usual / size) for a short batch.
        """
        if not self.ready:
            return 0.0
        value = max(-HUGE, min(HUGE, value))
        return self._ruled(value - self._centre.median()) / (self._scale * noise)

    def push(self, value: float, noise: float = 1.0) -> None:
        """Accept a finite value as healthy."""
        value = max(-HUGE, min(HUGE, value))
        if value < 0.0 and not self._linear:
            self._go_linear()
        if len(self._centre) >= LEAST:
            residual = self._ruled(value - self._forecast()) / noise
            if self.ready:
                self._tail.push(residual / self._scale)
            self._residuals.push(residual)
        leaving = self._centre.push(value)
        if leaving is not None:
            self._before.push(leaving)
        self._pushed += 1
        if self._pushed % REFIT_EVERY == 0 or len(self._residuals) < 2 * REFIT_EVERY:
            self._refit()

    def rebase(self, values: list[float]) -> None:
        """Take these finite values as the new level, e.g. after a shift that stayed."""
        values = [max(-HUGE, min(HUGE, value)) for value in values]
        if min(values) < 0.0 and not self._linear:
            self._go_linear()
        self._centre.replace(values)
        self._before.replace([])
        centre = self._centre.median()
        for value in values:
            self._residuals.push(self._ruled(value - centre))
        self._refit()

    def _unit(self, centre: float) -> float:
        unit = (1.0 + OFFSET) * centre
        return unit if unit > 0.0 else max(0.05 * self._centre.ordered[-1], 1e-30)

    def _forecast(self) -> float:
        """The level that a straight line through the last two medians leads to; without it a steep fall would pass for noise."""
        centre = self._centre.median()
        if len(self._before) < CENTRE:
            return centre
        return centre + (centre - self._before.median()) * (CENTRE + 1) / (2 * CENTRE)

    def _ruled(self, difference: float) -> float:
        """A difference from the level on the scale of the ruler."""
        if self._linear:
            return difference
        relative = difference / self._unit(self._centre.median())
        return min(math.log1p(relative), 700.0) if relative >= 0.0 else -min(math.log1p(-relative), 700.0)

    def _go_linear(self) -> None:
        unit = self._unit(self._centre.median()) if len(self._centre) else 1.0
        self._residuals.replace(
            [math.copysign(math.expm1(min(abs(r), 600.0)) * unit, r) for r in self._residuals.values()]
        )
        self._linear = True
        self._refit()

    def _refit(self) -> None:
        if not self.ready:
            return
        ordered = self._residuals.ordered
        middle = quantile(ordered, 0.5)
        widths = [(quantile(ordered, probability) - middle) / score for probability, score in SCALE_POINTS]
        centre = abs(self._centre.median())
        floor = max(1e-9 * centre, 1e-30) if self._linear else 1e-4
        self._scale = max(sum(widths) / len(widths), floor)
        count = len(self._tail)
        doubt = 0.85 / math.sqrt(max(count, 1))
        shape = _shape(self._tail.ordered) if count >= LEAST else HEAVIEST
        lean = 1.0 if shape > doubt else 0.0
        shape = min(HEAVIEST, max(0.0, lean * shape) + max(0.0, doubt - 0.03))
        self._limit = NORMAL_LIMIT * math.exp(shape * (NORMAL_LIMIT**2 - 1.0) / 2.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "centre": self._centre.values(),
            "before": self._before.values(),
            "residuals": self._residuals.values(),
            "tail": self._tail.values(),
            "linear": self._linear,
            "pushed": self._pushed,
            "limit": self._limit,
            "scale": self._scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._centre.replace(state["centre"])
        self._before.replace(state["before"])
        self._residuals.replace(state["residuals"])
        self._tail.replace(state["tail"])
        self._linear = state["linear"]
        self._pushed = state["pushed"]
        self._limit = state["limit"]
        self._scale = state["scale"]
