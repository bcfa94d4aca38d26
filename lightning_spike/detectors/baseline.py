"""How far a value lies outside the recent accepted values of its series.

One ruler for every series: loss, gradient norm, update size. A value is compared with the median of the last 32
accepted ones; the difference is taken on a logarithmic scale (or, once the series has been negative, on a plain one),
so that noise that is proportional to the level has one size along a falling curve. Its unit is the upper half-width of
the noise, and how far out is far is read off the tail that the series itself has shown.
"""

import math
from collections import deque
from math import log1p
from typing import Any, Final

from lightning_spike.rolling import LazyWindow, SortedWindow, quantile

CENTRE: Final = 32
"""Accepted values that make the present level: its median then adds 2.4 % to the noise, and follows a trend within 16
steps."""
SIDE: Final = 8
"""Accepted values on either side of the one whose noise is learnt: the mean of their two medians leaves no trend in the
residual."""
SCALE: Final = 512
"""Residuals that make the present noise; its standard error is then 5 %."""
AHEAD: Final = 128
"""Differences between a value and the level before it, which are larger than the noise where the loss wanders."""
WIDER: Final = 0.98
"""Standard deviation of normal noise about the median of the 32 values before it, over that about the mean of the two
medians around
it: sqrt(1 + 1.53 / 32) / sqrt(1 + 1.46 / 8 / 2), with the variance of a median of 32 and of 8."""
WANDER: Final = 0.85
"""Share of the width of those differences below which it is not believed: their own standard error is 11 %."""
TAIL: Final = 1536
"""Standardised residuals that show how heavy the tail is."""
NEARBY: Final = 64
"""Residuals around one that standardise it for the tail: noise that grows or shrinks along the run must not pass for a
heavy tail."""
LEAST: Final = 8
"""Accepted values without which no statement is made."""
OFFSET: Final = 0.5
"""Share of the median that is added before the logarithm: between none, which makes noise of a loss near zero all lower
tail, and one, which takes the logarithm back (science.md 1.5 compares 0.25 and 1)."""
REFIT_EVERY: Final = 16
"""Pushes between two measures of the noise; amortises their cost."""
EVERY_TIME: Final = 4 * REFIT_EVERY
"""Pushes from the start after each of which the noise is measured."""
MANY: Final = 256
"""Standardised residuals from which on the tail is looked at less often …"""
RESHAPE_EVERY: Final = 4 * REFIT_EVERY
"""… than the noise: it then changes by a few per cent in so many pushes."""
NORMAL_LIMIT: Final = 4.0
"""How far out is far for normal noise, in standard deviations: 3.2e-5 of the values lie beyond …"""
PLAIN_LIMIT: Final = 4.2
"""… and on the plain scale, where the logarithm does not shorten the upper side."""
TAIL_POINTS: Final = ((0.99, 2.3263), (0.995, 2.5758))
"""Probabilities at which the tail is read, with the normal quantile of each."""
FAR_POINT: Final = (0.998, 2.8782)
"""A further one for both tails together."""
ONE_SIGMA: Final = 0.8413
"""Phi(1): the upper half-width of normal noise is its standard deviation."""
HEAVIEST: Final = 0.30
"""Cap on the tail's shape h; Student's t with 2 degrees of freedom has about as much between these quantiles."""
SCALE_POINTS: Final = ((0.75, 0.6745), (0.8413, 1.0), (0.90, 1.2816), (0.95, 1.6449))
"""Probabilities whose half-widths are averaged into the scale, with the normal quantile of each."""
UPPER_DOUBT: Final = 0.78
"""Standard error of the upper tail's h times the square root of the number of residuals, for normal noise …"""
BOTH_DOUBT: Final = 0.5
"""… and that of both tails' h."""
HEAVY: Final = (2.0, 4.0)
"""Standard errors of h up to which a tail counts as that of normal noise, and from which on as heavier in full."""
POWER: Final = 1.2
"""Factor on the shape of a heavy tail: one that falls like a power stretches further out than the quantiles that were
read tell …"""
ADDED: Final = 2.0
"""… plus this many standard errors."""
KNOWN: Final = 1100
"""Residuals from which on noise that looks normal is taken as normal."""
EARLY: Final = 2.5
"""Standard errors that are added to what was seen when there is next to nothing yet; the fewer the closer that is."""
EARLY_MOST: Final = 0.2
"""Most that is allowed for what was not seen: five times the level at step 40 must be seen."""
SKEW_DOUBT: Final = 1.1
"""Standard error of the skew times the square root of the number of residuals, for normal noise."""
SKEW_POINTS: Final = (0.975, 0.99)
"""Probabilities at which the two sides are compared: for lognormal noise of 10 % they differ by 10 %, four standard
errors."""
SURE: Final = 6.0
"""On the logarithmic scale tails are light (science.md 1.5), so however heavy the tail may look or might still turn out
to be, this many standard deviations …"""
SURE_EARLY: Final = 5.0
"""… plus this over the square root of the number of residuals, for a scale that is not well known yet …"""
DOUBLED: Final = 0.5
"""… are too far where the value also stands this much, in logarithms, above the level: about twice it. Below, the noise
is small beside the level and a heavy tail can well be an additive one."""
WINDOWS: Final = ("centre", "residuals", "ahead", "tail")
LISTS: Final = ("levels", "right", "rights", "waiting")
NUMBERS: Final = (
    "linear",
    "pushed",
    "near",
    "level",
    "unit",
    "shape",
    "skew",
    "limit",
    "sure_limit",
    "pair_limit",
    "run_limit",
    "scale",
    "agree",
    "side",
)
FAR_BEYOND: Final = 5.0
"""Times the largest excess of the last 512 values from which on a value is too far whatever the law of the noise:
beyond that, a tail that falls like 1/x^3 has 2e-5 of its values (1 / 512 / 5^3) …"""
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
LATELY_DOUBT: Final = 0.4
"""Standard error of a median of eight about that of the 32 that they belong to."""
AHEAD_OF_LATELY: Final = 1.4
"""Where a straight line through the two medians leads to: they are 16.5 and 4.5 values old, so 4.5 / 12 of their
distance further."""
RUN: Final = 8
"""Successive scores that are summed."""
RUN_CLIP: Final = 3.0
"""Most that one of them may add: a heavy tail then says no more than normal noise does."""
RUN_LIMIT: Final = 4.6
"""Standard deviations of the sum that are too far: 2e-6 of the normal ones lie beyond. More where each score is like
the one before, which is measured by the noise about a level that follows them, and is therefore more than it seems."""
CENTRE_VARIANCE: Final = 1.53 / CENTRE
"""Variance of a median of 32 normal values, which all of them share."""
MEMORY: Final = 1.0 / 128.0
"""Weight of the newest pair in the share of neighbours on the same side of the level."""
LIKE: Final = 0.5
"""Share by which the limit grows where each value is like the one before: the scale is then made of few independent
values."""
HUGE: Final = 1e300
"""Values are cut here, so that differences stay finite."""
MOST_RULED: Final = math.log(HUGE)


def _half_width(ordered: list[float]) -> float:
    """Standard deviation by the upper half of the noise."""
    middle = quantile(ordered, 0.5)
    return sum((quantile(ordered, probability) - middle) / score for probability, score in SCALE_POINTS) / len(
        SCALE_POINTS
    )


def _shapes(ordered: list[float]) -> tuple[float, float]:
    """Tail shape h of Tukey's g-and-h family, of the upper tail and of both together.

    A quantile at normal score z is stretched by exp(h z^2 / 2). Where both tails are heavy, twice the values tell of
    it.
    """
    one = 0.5 * (quantile(ordered, ONE_SIGMA) - quantile(ordered, 1.0 - ONE_SIGMA))
    if one <= 0.0:
        return HEAVIEST, HEAVIEST
    count = max(2, math.ceil(2.0 * (1.0 - TAIL_POINTS[0][0]) * len(ordered)) + 1)
    ends = sorted([-value for value in ordered[:count]] + ordered[-count:])
    upper = [(quantile(ordered, probability), score) for probability, score in TAIL_POINTS]
    both = [
        (ends[-1 - round(2.0 * (1.0 - probability) * (len(ordered) - 1))], score)
        for probability, score in (*TAIL_POINTS, FAR_POINT)
    ]
    return _mean_shape(upper, one), _mean_shape(both, one)


def _heavy(shape: float, doubt: float) -> float:
    """What is made of a measured shape with this standard error.

    Nothing for one that chance can give, the more the surer it is.
    """
    sure = (shape / doubt - HEAVY[0]) / (HEAVY[1] - HEAVY[0])
    return max(0.0, min(1.0, sure)) * (POWER * shape + ADDED * doubt)


def _skew(ordered: list[float]) -> float:
    """How much longer the upper side is than the lower one, as a share of their mean; 0 for a symmetric law."""
    middle = quantile(ordered, 0.5)
    shares = []
    for probability in SKEW_POINTS:
        low, high = quantile(ordered, 1.0 - probability), quantile(ordered, probability)
        shares.append((high + low - 2.0 * middle) / (high - low) if high > low else 0.0)
    return sum(shares) / len(shares)


def _mean_shape(points: list[tuple[float, float]], one: float) -> float:
    shapes = [2.0 * math.log(max(value, 1e-12) / (one * score)) / (score * score - 1.0) for value, score in points]
    return sum(shapes) / len(shapes)


def _stretch(score: float, shape: float) -> float:
    """How much further out a quantile lies than its normal score, for a tail of this shape."""
    return math.exp(shape * (score * score - 1.0) / 2.0)


class Baseline:
    """Recent accepted values of one series, and the ruler they make.

    `score` says how far out a value is, `limit` how far out is too far, `push` accepts a value.
    """

    __slots__ = (*(f"_{name}" for name in (*WINDOWS, *LISTS, *NUMBERS)),)

    def __init__(self) -> None:
        """Start empty."""
        self._centre = SortedWindow(CENTRE)
        self._levels: deque[float] = deque(maxlen=CENTRE + 1)
        """The last levels: the first of 33 is that of the 32 values before those that make the present one."""
        self._right: deque[float] = deque(maxlen=SIDE)
        """The newest values: the right side of the one before them."""
        self._rights: deque[float] = deque(maxlen=SIDE + 2)
        """Medians of the right side: the first of ten is that of the left side."""
        self._waiting: deque[float] = deque(maxlen=SIDE + 1)
        """How noisy the newest values were said to be."""
        self._residuals = LazyWindow(SCALE)
        self._ahead = LazyWindow(AHEAD)
        self._tail = LazyWindow(TAIL)
        self._linear = False
        self._pushed = 0
        self._near = 0.0
        self._level = 0.0
        self._unit = 1.0
        self._shape = 0.0
        self._skew = 0.0
        self._limit = math.inf
        self._sure_limit = math.inf
        self._pair_limit = math.inf
        self._run_limit = math.inf
        self._agree = 0.0
        self._side = 0.0
        self._scale = math.inf

    @property
    def ready(self) -> bool:
        """Enough values have been accepted to judge one."""
        return self._scale != math.inf

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
    def run_limit(self) -> float:
        """Sum of eight successive clipped scores beyond which they do not belong to the noise."""
        return self._run_limit

    @property
    def lately(self) -> float:
        """Median of the last eight accepted values; of fewer, the level."""
        return self._rights[-1] if self._rights else self._level

    @property
    def lift(self) -> float:
        """How far above the level the last eight accepted values lead, in the unit of the score; 0 for what chance can give."""
        lift = self._ruled(self.lately - self._level) / self._scale
        return AHEAD_OF_LATELY * lift if lift > LATELY_DOUBT else 0.0

    @property
    def spread(self) -> float:
        """The noise's upper half-width in the units of the series, at the present level; infinite until ready."""
        if self._scale == math.inf:
            return math.inf
        return self._scale if self._linear else math.expm1(min(self._scale, 600.0)) * self._unit

    def score(self, value: float, noise: float = 1.0) -> float:
        """Robust standard deviations above (+) or below (-) the recent level; 0.0 until ready.

        Args:
            value: A finite number.
            noise: How many times noisier than usual this value is, sqrt(usual / size) for a short batch.
        """
        if self._scale == math.inf:
            return 0.0
        if not -HUGE <= value <= HUGE:
            value = math.copysign(HUGE, value)
        return self._ruled(value - self._level) / (self._scale * noise)

    def push(self, value: float, noise: float = 1.0) -> None:
        """Accept a finite value as healthy."""
        if not -HUGE <= value <= HUGE:
            value = math.copysign(HUGE, value)
        if value < 0.0 and not self._linear:
            self._go_linear()
        centre = self._centre
        if len(centre.ordered) >= LEAST:
            self._ahead.push(self._ruled(value - self._forecast()) / noise)
        centre.push(value)
        self._follow()
        self._learn(value, noise)
        self._pushed += 1
        if self._pushed % REFIT_EVERY == 0 or self._pushed < EVERY_TIME:
            self._refit()

    def _follow(self) -> None:
        """Keep the level and the ruler's unit at hand: every value is measured with them several times."""
        ordered = self._centre.ordered
        if len(ordered) == CENTRE:
            level = 0.5 * ordered[CENTRE // 2 - 1] + 0.5 * ordered[CENTRE // 2]
            self._levels.append(level)
        else:
            level = self._centre.median()
        self._level = level
        unit = (1.0 + OFFSET) * level
        self._unit = unit if unit > 0.0 else max(0.05 * ordered[-1], 1e-30)

    def _learn(self, value: float, noise: float) -> None:
        """Take in the noise of the value eight pushes ago, now that both its sides are known."""
        right = self._right
        self._waiting.append(noise)
        learnt = right[0] if right else 0.0
        right.append(value)
        if len(right) < SIDE:
            return
        ordered = sorted(right)
        side = 0.5 * ordered[SIDE // 2 - 1] + 0.5 * ordered[SIDE // 2]
        rights = self._rights
        rights.append(side)
        if len(rights) == SIDE + 2:
            self._take(self._ruled(learnt - 0.5 * (rights[0] + side)) / self._waiting[0])

    def _take(self, residual: float) -> None:
        """Take in one value's noise."""
        side = 1.0 if residual > 0.0 else -1.0 if residual < 0.0 else 0.0
        self._agree += MEMORY * (side * self._side - self._agree)
        self._side = side
        self._residuals.push(residual)
        if self._near > 0.0:
            self._tail.push(self._residuals.back(NEARBY // 2) / self._near)

    def rebase(self, values: list[float]) -> None:
        """Take these finite values as the new level, e.g. after a shift that stayed."""
        values = [max(-HUGE, min(HUGE, value)) for value in values]
        if min(values) < 0.0 and not self._linear:
            self._go_linear()
        self._centre.replace(values)
        for followed in (self._levels, self._right, self._rights, self._waiting):
            followed.clear()
        self._follow()
        for value in values:
            self._learn(value, 1.0)
        self._refit()

    def _forecast(self) -> float:
        """The level that a straight line through the last two medians leads to.

        Without it a steep fall would pass for noise.
        """
        if len(self._levels) <= CENTRE:
            return self._level
        return self._level + (self._level - self._levels[0]) * ((CENTRE + 1) / (2 * CENTRE))

    def _ruled(self, difference: float) -> float:
        """A difference from the level on the scale of the ruler."""
        if self._linear:
            return difference
        relative = difference / self._unit
        if relative >= 0.0:
            return log1p(relative) if relative < HUGE else MOST_RULED
        return -log1p(-relative) if relative > -HUGE else -MOST_RULED

    def _unruled(self, residual: float) -> float:
        """The difference that `_ruled` made a residual of, on the logarithmic scale."""
        return math.copysign(min(math.expm1(min(abs(residual), 600.0)) * self._unit, HUGE), residual)

    def _go_linear(self) -> None:
        """The series is negative for the first time: from here on differences count as they are."""
        for window in (self._residuals, self._ahead):
            window.replace([self._unruled(residual) for residual in window.values()])
        self._linear = True
        self._refit()

    def _refit(self) -> None:
        """Measure the noise and its tail, and set the limits by them."""
        if len(self._residuals) < LEAST:
            return
        ordered = self._residuals.ordered
        nearby = sorted(self._residuals.latest(NEARBY))
        if len(nearby) == NEARBY:
            self._near = 0.5 * (quantile(nearby, ONE_SIGMA) - quantile(nearby, 1.0 - ONE_SIGMA))
        floor = max(1e-9 * abs(self._level), 1e-30) if self._linear else 1e-4
        width = max(_half_width(ordered), floor)
        wander = _half_width(self._ahead.ordered) if len(self._ahead) >= LEAST else 0.0
        self._scale = max(WIDER * width, WANDER * wander, NEAR * self._near, PRESENT * self._present())
        if len(self._tail) < MANY or self._pushed % RESHAPE_EVERY == 0:
            tail = self._tail.ordered if len(self._tail) >= NEARBY else ordered
            self._shape, self._skew = self._tail_shape(tail), max(0.0, _skew(tail) - SKEW_DOUBT / math.sqrt(len(tail)))
        self._set_limits(ordered, nearby[-1])

    def _tail_shape(self, tail: list[float]) -> float:
        """Shape h of the tail, with what is not known of it added; 0 for one that is like that of normal noise."""
        root = math.sqrt(len(tail))
        upper, both = _shapes(tail)
        heavy = (_heavy(upper, UPPER_DOUBT / root), _heavy(both, BOTH_DOUBT / root))
        young = max(0.0, 1.0 - len(tail) / KNOWN)
        allowed = young * (POWER * max(0.0, upper, both) + EARLY * BOTH_DOUBT / root)
        return min(HEAVIEST, max(min(EARLY_MOST, allowed), *heavy))

    def _set_limits(self, ordered: list[float], top: float) -> None:
        shape = self._shape
        agree = max(0.0, math.sin(0.5 * math.pi * self._agree))
        few = 1.0 + LIKE * agree * agree
        normal = (PLAIN_LIMIT if self._linear else NORMAL_LIMIT) * (1.0 + self._skew)
        self._limit = few * min(normal * _stretch(NORMAL_LIMIT, shape), self._beyond(ordered))
        self._sure_limit = min(self._limit, few * self._surely(top))
        pair = PAIR_LIMIT * _stretch(PAIR_LIMIT, shape)
        self._pair_limit = min(self._limit, pair + min(1.0, 2.0 * agree) * (self._limit - pair))
        alike = sum((RUN - lag) * agree**lag for lag in range(1, RUN)) if agree > 0.0 else 0.0
        self._run_limit = RUN_LIMIT * (1.0 + agree) * math.sqrt(RUN + 2.0 * alike + RUN * RUN * CENTRE_VARIANCE)

    def _present(self) -> float:
        """The noise by the values that make the level alone, their trend taken off.

        It knows at once when noise grows.
        """
        fall = self._levels[0] - self._level if len(self._levels) > CENTRE else 0.0
        return self._ruled(self._centre.quantile(ONE_SIGMA) - self._level - TREND * max(0.0, fall))

    def _beyond(self, ordered: list[float]) -> float:
        """The score that is too far however heavy the tail may be: far beyond all that was seen."""
        factor = FAR_BEYOND + FEW / len(ordered)
        top = max(ordered[-1], self._ahead.ordered[-1] if self._ahead.ordered else 0.0)
        return max(NORMAL_LIMIT, self._times(top, factor))

    def _surely(self, top: float) -> float:
        """The score that is too far on the logarithmic scale, whose tails are light."""
        if self._linear:
            return math.inf
        surely = SURE + SURE_EARLY / math.sqrt(len(self._residuals))
        return max(surely, DOUBLED / self._scale, self._times(top, NEAR_TOP))

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
            **{name: list(getattr(self, f"_{name}")) for name in LISTS},
            **{name: getattr(self, f"_{name}") for name in NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        for name in WINDOWS:
            getattr(self, f"_{name}").replace(state[name])
        for name in LISTS:
            values = getattr(self, f"_{name}")
            values.clear()
            values.extend(state[name])
        for name in NUMBERS:
            setattr(self, f"_{name}", state[name])
