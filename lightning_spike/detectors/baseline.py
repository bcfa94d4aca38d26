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
SIDE: Final = 8
"""Accepted values on either side of the one whose noise is learnt: the mean of their two medians leaves no trend in the residual."""
SCALE: Final = 384
"""Residuals that make the present noise; its standard error is then 6 %."""
AHEAD: Final = 128
"""Differences between a value and the level before it, which are larger than the noise where the loss wanders."""
WIDER: Final = 0.98
"""Standard deviation of normal noise about the median of the 32 values before it, over that about the mean of the two medians around
it: sqrt(1 + 1.53 / 32) / sqrt(1 + 1.46 / 8 / 2), with the variance of a median of 32 and of 8."""
WANDER: Final = 0.85
"""Share of the width of those differences below which it is not believed: their own standard error is 11 %."""
TAIL: Final = 1536
"""Standardised residuals that show how heavy the tail is."""
NEARBY: Final = 64
"""Residuals around one that standardise it for the tail: noise that grows or shrinks along the run must not pass for a heavy tail."""
NEARBY_EVERY: Final = 8
"""Pushes between two measures of their width."""
LEAST: Final = 8
"""Accepted values without which no statement is made."""
OFFSET: Final = 0.5
"""Share of the median that is added before the logarithm: between none, which makes noise of a loss near zero all lower tail, and
one, which takes the logarithm back (science.md 1.5 compares 0.25 and 1)."""
REFIT_EVERY: Final = 16
"""Pushes between two looks at the tail; amortises its cost."""
NORMAL_LIMIT: Final = 4.1
"""How far out is far for normal noise, in standard deviations: 2.1e-5 of the values lie beyond."""
TAIL_POINTS: Final = ((0.99, 2.3263), (0.995, 2.5758))
"""Probabilities at which the tail is read, with the normal quantile of each."""
FAR_POINT: Final = (0.998, 2.8782)
"""A further one for both tails together."""
ONE_SIGMA: Final = 0.8413
"""Phi(1): the upper half-width of normal noise is its standard deviation."""
HEAVIEST: Final = 0.30
"""Cap on the tail's shape h; Student's t with 2 degrees of freedom has about as much between these quantiles."""
SCALE_POINTS: Final = ((0.75, 0.6745), (0.8413, 1.0), (0.90, 1.2816))
"""Probabilities whose half-widths are averaged into the scale, with the normal quantile of each."""
DOUBT: Final = 0.54
"""Standard error of h times the square root of the number of residuals, for normal noise."""
HEAVY: Final = 2.1
"""Standard errors of h from which on the tail is called heavier than normal."""
POWER: Final = 1.1
"""Factor on the shape of a heavy tail: one that falls like a power stretches further out than the quantiles that were read tell."""
KNOWN: Final = 0.018
"""Standard error of h from which on normal-looking noise is taken as normal: some 900 residuals."""
EARLY: Final = 5.0
"""Standard errors of h, above that, that are added before."""
EARLY_MOST: Final = 0.2
"""Most that is added: five times the level at step 40 must be seen."""
SURE: Final = 6.0
"""On the logarithmic scale tails are light (science.md 1.5), so however heavy the tail may look or might still turn out to be, this
many standard deviations …"""
SURE_EARLY: Final = 5.0
"""… plus this over the square root of the number of residuals, for a scale that is not well known yet …"""
DOUBLED: Final = 0.5
"""… are too far where the value also stands this much, in logarithms, above the level: about twice it. Below, the noise is small beside
the level and a heavy tail can well be an additive one."""
WINDOWS: Final = ("centre", "before", "right", "nearby", "residuals", "ahead", "tail")
NUMBERS: Final = (
    "linear",
    "pushed",
    "near",
    "level",
    "unit",
    "limit",
    "sure_limit",
    "pair_limit",
    "scale",
    "agree",
    "side",
)
FAR_BEYOND: Final = 4.0
"""Times the largest excess of the last 384 values from which on a value is too far whatever the law of the noise: beyond that, a tail that falls
like 1/x^3 has 4e-5 of its values, a lognormal one with sigma 1 has 1e-5 …"""
FEW: Final = 128.0
"""… plus this over the number of values."""
NEAR_TOP: Final = 1.5
"""Times the largest excess of the last 64."""
NEAR: Final = 0.85
"""Share of the width of the last 64 residuals below which it is not believed: noise that grows is noticed in time."""
PRESENT: Final = 0.7
"""Share of the width of the last 32 values below which it is not believed: its standard error is 22 %."""
TREND: Final = 0.34
"""Share of the fall from one median of 32 to the next that a straight line adds to their upper half-width."""
PAIR_LIMIT: Final = 3.2
"""Two in a row beyond this are too far for normal noise without memory: 5e-7 of the pairs are."""
MEMORY: Final = 1.0 / 128.0
"""Weight of the newest pair in the share of neighbours on the same side of the level."""
LIKE: Final = 0.5
"""Share by which the limit grows where each value is like the one before: the scale is then made of few independent values."""
HUGE: Final = 1e300
"""Values are cut here, so that differences stay finite."""


def _half_width(ordered: list[float]) -> float:
    """Standard deviation by the upper half of the noise."""
    middle = quantile(ordered, 0.5)
    return sum((quantile(ordered, probability) - middle) / score for probability, score in SCALE_POINTS) / len(
        SCALE_POINTS
    )


def _shape(ordered: list[float]) -> float:
    """Tail shape h of Tukey's g-and-h family: a quantile at normal score z is stretched by exp(h z^2 / 2).

    The heavier of the upper tail and of both tails together: where both are heavy, twice the values tell of it.
    """
    one = 0.5 * (quantile(ordered, ONE_SIGMA) - quantile(ordered, 1.0 - ONE_SIGMA))
    if one <= 0.0:
        return HEAVIEST
    count = max(2, math.ceil(2.0 * (1.0 - TAIL_POINTS[0][0]) * len(ordered)) + 1)
    ends = sorted([-value for value in ordered[:count]] + ordered[-count:])
    upper = [(quantile(ordered, probability), score) for probability, score in TAIL_POINTS]
    both = [
        (ends[-1 - round(2.0 * (1.0 - probability) * (len(ordered) - 1))], score)
        for probability, score in (*TAIL_POINTS, FAR_POINT)
    ]
    return max(_mean_shape(upper, one), _mean_shape(both, one))


def _mean_shape(points: list[tuple[float, float]], one: float) -> float:
    shapes = [2.0 * math.log(max(value, 1e-12) / (one * score)) / (score * score - 1.0) for value, score in points]
    return sum(shapes) / len(shapes)


def _stretch(score: float, shape: float) -> float:
    """How much further out a quantile lies than its normal score, for a tail of this shape."""
    return math.exp(shape * (score * score - 1.0) / 2.0)


class Baseline:
    """Recent accepted values of one series, and the ruler they make.

    `score` says how far out a value is, `limit` how far out is too far, `push` accepts a value. Ten microseconds for the three.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._centre = SortedWindow(CENTRE)
        self._before = SortedWindow(CENTRE)
        self._right = SortedWindow(SIDE)
        self._sides: list[float] = []
        """Medians of the right side, the last nine: the first of them is that of the left side."""
        self._waiting: list[float] = []
        self._nearby = SortedWindow(NEARBY)
        self._recent: list[float] = []
        self._residuals = SortedWindow(SCALE)
        self._ahead = SortedWindow(AHEAD)
        self._tail = SortedWindow(TAIL)
        self._linear = False
        self._pushed = 0
        self._near = 0.0
        self._level = 0.0
        self._unit = 1.0
        self._limit = math.inf
        self._sure_limit = math.inf
        self._pair_limit = math.inf
        self._agree = 0.0
        self._side = 0.0
        self._scale = math.inf

    @property
    def ready(self) -> bool:
        """Enough values have been accepted to judge one."""
        return len(self._residuals) >= LEAST

    @property
    def level(self) -> float | None:
        """Median of the last 32 accepted values; `None` before the first."""
        return self._level if self._centre.ordered else None

    @property
    def limit(self) -> float:
        """Score beyond which a value does not belong to the noise; infinite until the baseline is ready."""
        return self._limit

    @property
    def sure_limit(self) -> float:
        """The same, or less: for a value that no single sample can have made, see `FastDetector`."""
        return self._sure_limit

    @property
    def pair_limit(self) -> float:
        """Score beyond which two successive values do not belong to the noise."""
        return self._pair_limit

    @property
    def spread(self) -> float:
        """The noise's upper half-width in the units of the series, at the present level; infinite until ready."""
        if not self.ready:
            return math.inf
        return self._scale if self._linear else math.expm1(min(self._scale, 600.0)) * self._unit

    def score(self, value: float, noise: float = 1.0) -> float:
        """Robust standard deviations above (+) or below (-) the recent level; 0.0 until ready.

        Args:
            value: A finite number.
            noise: How many times noisier than usual this value is, sqrt(usual / size) for a short batch.
        """
        if not self.ready:
            return 0.0
        return self._ruled(max(-HUGE, min(HUGE, value)) - self._level) / (self._scale * noise)

    def push(self, value: float, noise: float = 1.0) -> None:
        """Accept a finite value as healthy."""
        value = max(-HUGE, min(HUGE, value))
        if value < 0.0 and not self._linear:
            self._go_linear()
        if len(self._centre) >= LEAST:
            self._ahead.push(self._ruled(value - self._forecast()) / noise)
        leaving = self._centre.push(value)
        if leaving is not None:
            self._before.push(leaving)
        self._follow()
        self._learn(value, noise)
        self._pushed += 1
        if self._pushed % REFIT_EVERY == 0 or len(self._residuals) < 2 * REFIT_EVERY:
            self._refit()

    def _follow(self) -> None:
        """Keep the level and the ruler's unit at hand: every value is measured with them several times."""
        self._level = self._centre.median()
        unit = (1.0 + OFFSET) * self._level
        self._unit = unit if unit > 0.0 else max(0.05 * self._centre.ordered[-1], 1e-30)

    def _learn(self, value: float, noise: float) -> None:
        """Take in the noise of the value eight pushes ago, now that both its sides are known."""
        self._waiting.append(noise)
        learnt = self._right.push(value)
        if learnt is None:
            if len(self._right) == SIDE:
                self._sides.append(self._right.median())
            return
        its_noise = self._waiting.pop(0)
        side = self._right.median()
        self._sides.append(side)
        if len(self._sides) > SIDE + 1:
            self._take(self._ruled(learnt - 0.5 * (self._sides.pop(0) + side)) / its_noise)

    def _take(self, residual: float) -> None:
        """Take in one value's noise."""
        side = float((residual > 0.0) - (residual < 0.0))
        self._agree += MEMORY * (side * self._side - self._agree)
        self._side = side
        self._residuals.push(residual)
        self._nearby.push(residual)
        self._recent.append(residual)
        if len(self._nearby) == NEARBY:
            del self._recent[: -(NEARBY // 2)]
            if self._pushed % NEARBY_EVERY == 0 or self._near <= 0.0:
                self._near = 0.5 * (self._nearby.quantile(ONE_SIGMA) - self._nearby.quantile(1.0 - ONE_SIGMA))
            if self._near > 0.0:
                self._tail.push(self._recent[0] / self._near)

    def rebase(self, values: list[float]) -> None:
        """Take these finite values as the new level, e.g. after a shift that stayed."""
        values = [max(-HUGE, min(HUGE, value)) for value in values]
        if min(values) < 0.0 and not self._linear:
            self._go_linear()
        self._centre.replace(values)
        self._follow()
        self._before.replace([])
        self._sides.clear()
        self._right.replace([])
        self._waiting.clear()
        for value in values:
            self._learn(value, 1.0)
        self._refit()

    def _forecast(self) -> float:
        """The level that a straight line through the last two medians leads to; without it a steep fall would pass for noise."""
        if len(self._before) < CENTRE:
            return self._level
        return self._level + (self._level - self._before.median()) * (CENTRE + 1) / (2 * CENTRE)

    def _ruled(self, difference: float) -> float:
        """A difference from the level on the scale of the ruler."""
        if self._linear:
            return difference
        relative = difference / self._unit
        return min(math.log1p(relative), 700.0) if relative >= 0.0 else -min(math.log1p(-relative), 700.0)

    def _unruled(self, residual: float) -> float:
        """The difference that `_ruled` made a residual of, on the logarithmic scale."""
        return math.copysign(min(math.expm1(min(abs(residual), 600.0)) * self._unit, HUGE), residual)

    def _go_linear(self) -> None:
        """The series is negative for the first time: from here on differences count as they are."""
        for window in (self._residuals, self._ahead, self._nearby):
            window.replace([self._unruled(residual) for residual in window.values()])
        self._recent = [self._unruled(residual) for residual in self._recent]
        self._near = 0.0
        self._linear = True
        self._refit()

    def _refit(self) -> None:
        if not self.ready:
            return
        ordered = self._residuals.ordered
        floor = max(1e-9 * abs(self._level), 1e-30) if self._linear else 1e-4
        width = max(_half_width(ordered), floor)
        wander = _half_width(self._ahead.ordered) if len(self._ahead) >= LEAST else 0.0
        self._scale = max(WIDER * width, WANDER * wander, NEAR * self._near, PRESENT * self._present())
        tail = self._tail.ordered if len(self._tail) >= NEARBY else ordered
        doubt = DOUBT / math.sqrt(len(tail))
        shape = _shape(tail)
        shape = POWER * shape + doubt if shape > HEAVY * doubt else 0.0
        shape = min(HEAVIEST, max(shape, min(EARLY_MOST, shape + EARLY * max(0.0, doubt - KNOWN))))
        agree = max(0.0, math.sin(0.5 * math.pi * self._agree))
        few = 1.0 + LIKE * agree * agree
        self._limit = few * min(NORMAL_LIMIT * _stretch(NORMAL_LIMIT, shape), self._beyond(ordered))
        self._sure_limit = min(self._limit, few * self._surely())
        pair = PAIR_LIMIT * _stretch(PAIR_LIMIT, shape)
        self._pair_limit = min(self._limit, pair + min(1.0, 2.0 * agree) * (self._limit - pair))

    def _present(self) -> float:
        """The noise by the values that make the level alone, their trend taken off: it knows at once when noise grows."""
        fall = self._before.median() - self._level if len(self._before) == CENTRE else 0.0
        return self._ruled(self._centre.quantile(ONE_SIGMA) - self._level - TREND * max(0.0, fall))

    def _beyond(self, ordered: list[float]) -> float:
        """The score that is too far however heavy the tail may be: far beyond all that was seen."""
        factor = FAR_BEYOND + FEW / len(ordered)
        top = max(ordered[-1], self._ahead.ordered[-1] if self._ahead.ordered else 0.0)
        return max(NORMAL_LIMIT, self._times(top, factor))

    def _surely(self) -> float:
        """The score that is too far on the logarithmic scale, whose tails are light."""
        if self._linear:
            return math.inf
        surely = SURE + SURE_EARLY / math.sqrt(len(self._residuals))
        return max(surely, DOUBLED / self._scale, self._times(self._nearby.ordered[-1], NEAR_TOP))

    def _times(self, residual: float, factor: float) -> float:
        """The score of a value whose distance from the level is `factor` times that of this residual."""
        residual = max(0.0, residual)
        if self._linear:
            return factor * residual / self._scale
        return math.log1p(factor * math.expm1(min(residual, 600.0))) / self._scale

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            **{name: getattr(self, f"_{name}").values() for name in WINDOWS},
            **{name: getattr(self, f"_{name}") for name in NUMBERS},
            "recent": list(self._recent),
            "waiting": list(self._waiting),
            "sides": list(self._sides),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        for name in WINDOWS:
            getattr(self, f"_{name}").replace(state[name])
        for name in NUMBERS:
            setattr(self, f"_{name}", state[name])
        self._recent = list(state["recent"])
        self._waiting = list(state["waiting"])
        self._sides = list(state["sides"])
