"""Robust score of a value against the recent accepted values of its series.

A value is compared with the median of the last 32 accepted ones, on a logarithmic scale, or on a plain one once the
series was negative. Noise proportional to the level then has one size along a falling curve. The unit of the score is
the upper half-width of the noise; the limits follow from the tail that the series has shown.
"""

import math
from collections import deque
from math import log1p
from typing import Final

from lightning_spike.detectors.resumable import Resumable
from lightning_spike.rolling import LazyWindow, SortedWindow, quantile

LEVEL_WINDOW: Final = 32
"""Accepted values whose median is the present level; it adds 2.4 % to the noise; engineering choice."""
SIDE_WINDOW: Final = 8
"""Accepted values on each side of the one whose residual is taken, so that no trend is left in it;
engineering choice."""
NOISE_WINDOW: Final = 512
"""Residuals that measure the noise, with a standard error of 5 %; engineering choice."""
AHEAD_WINDOW: Final = 128
"""Differences between a value and the forecast level; they exceed the noise where the loss wanders;
engineering choice."""
RUNNING_LEVEL_FACTOR: Final = 0.98
"""Noise about the median of the 32 values before, over noise about the mean of the two medians around, by definition:
sqrt(1 + 1.53 / 32) / sqrt(1 + 1.46 / 8 / 2), with the variance of a median of 32 and of 8."""
MIN_AHEAD_SHARE: Final = 0.85
"""Share of the forecast differences' width that the noise has at least; their standard error is 11 %;
engineering choice."""
TAIL_WINDOW: Final = 1536
"""Standardised residuals that measure the tail; engineering choice."""
LOCAL_WINDOW: Final = 64
"""Residuals that standardise the one in their middle, so that changing noise does not pass for a heavy tail;
engineering choice."""
MIN_VALUES: Final = 8
"""Accepted values before the baseline is ready; engineering choice."""
LOG_OFFSET: Final = 0.5
"""Share of the median that is added before the logarithm, between 0.25 and 1 of science.md 1.5."""
REFIT_EVERY: Final = 16
"""Pushes between two measurements of the noise, which bounds their cost; engineering choice."""
REFIT_ALWAYS_UNTIL: Final = 4 * REFIT_EVERY
"""Pushes from the start, up to which each measures the noise; engineering choice."""
RESHAPE_ALWAYS_UNTIL: Final = 256
"""Standardised residuals up to which the tail is measured with the noise; engineering choice."""
RESHAPE_EVERY: Final = 4 * REFIT_EVERY
"""Pushes between two measurements of the tail after that; it changes by a few per cent; engineering choice."""
NORMAL_LIMIT: Final = 4.0
"""Score limit for normal noise: 3.2e-5 of the values lie beyond; science.md 1.5 uses 3.5 to 4."""
PLAIN_LIMIT: Final = 4.2
"""The same limit on the plain scale, which does not shorten the upper side; engineering choice."""
TAIL_POINTS: Final = ((0.99, 2.3263), (0.995, 2.5758))
"""Probabilities at which the tail is read, with their normal quantiles."""
FAR_POINT: Final = (0.998, 2.8782)
"""A further one for both tails together."""
ONE_SIGMA: Final = 0.8413
"""Phi(1), by definition: the upper half-width of normal noise is its standard deviation."""
MAX_TAIL_SHAPE: Final = 0.30
"""Largest tail shape h; Student's t with 2 degrees of freedom has about as much; engineering choice."""
SCALE_POINTS: Final = ((0.75, 0.6745), (0.8413, 1.0), (0.90, 1.2816), (0.95, 1.6449))
"""Probabilities whose half-widths are averaged into the scale, with their normal quantiles."""
UPPER_SHAPE_ERROR: Final = 0.78
"""Standard error of the upper tail's h for normal noise, times the root of the number of residuals; simulated, an
engineering choice."""
BOTH_SHAPE_ERROR: Final = 0.5
"""… and that of both tails' h."""
HEAVY_ERRORS: Final = (2.0, 4.0)
"""Standard errors of h up to which a tail counts as normal, and from which on as heavier in full."""
HEAVY_FACTOR: Final = 1.2
"""Factor on the shape of a heavy tail: a power law reaches further out than the quantiles show; engineering choice."""
HEAVY_ERRORS_ADDED: Final = 2.0
"""Standard errors that are added to that shape; engineering choice."""
RESIDUALS_FOR_NORMAL: Final = 1100
"""Residuals from which on noise that looks normal counts as normal; engineering choice."""
EARLY_ERRORS_ADDED: Final = 2.5
"""Standard errors of h that are allowed for before the first residuals, falling to 0 at `RESIDUALS_FOR_NORMAL`;
engineering choice."""
MAX_EARLY_SHAPE: Final = 0.2
"""Largest h allowed for what was not seen yet, so that five times the level at step 40 is detected;
engineering choice."""
SKEW_ERROR: Final = 1.1
"""Standard error of the skew for normal noise, times the root of the number of residuals; simulated,
an engineering choice."""
SKEW_POINTS: Final = (0.975, 0.99)
"""Probabilities at which the two sides are compared; for lognormal noise of 10 % they differ by four standard
errors."""
LOG_LIMIT: Final = 6.0
"""Score limit on the logarithmic scale whatever the tail: log losses are light-tailed (science.md 1.5)."""
LOG_LIMIT_EARLY: Final = 5.0
"""Added to `LOG_LIMIT` over the root of the number of residuals, while the scale is uncertain; engineering choice."""
MIN_LOG_RISE: Final = 0.5
"""Smallest rise in logarithms for `LOG_LIMIT`: below it, a heavy tail can be additive noise; engineering choice."""
FAR_BEYOND_FACTOR: Final = 5.0
"""Times the largest excess of the last 512 values that is out of range for any noise: a tail like 1/x^3 has 2e-5 of its
values beyond (1 / 512 / 5^3); engineering choice."""
FAR_BEYOND_EARLY: Final = 128.0
"""Added to `FAR_BEYOND_FACTOR` over the number of values; engineering choice."""
NEAR_TOP_FACTOR: Final = 1.5
"""Times the largest excess of the last 64 that `LOG_LIMIT` requires; engineering choice."""
MIN_LOCAL_SHARE: Final = 0.85
"""Share of the width of the last 64 residuals that the noise has at least, so that growing noise is followed;
engineering choice."""
MIN_PRESENT_SHARE: Final = 0.7
"""Share of the width of the last 32 values that the noise has at least; their standard error is 22 %;
engineering choice."""
TREND_SHARE: Final = 0.34
"""Share of the fall between two medians of 32 that a straight line adds to the upper half-width, by definition."""
PAIR_LIMIT: Final = 3.2
"""Score limit for two values in a row, 5e-7 of normal pairs; science.md 1.5 measures 3.2 to 3.5."""
RECENT_MEDIAN_ERROR: Final = 0.4
"""Standard error of a median of 8 about that of the 32 it belongs to, by definition, in sigma."""
EXTRAPOLATION: Final = 1.4
"""Extends a line through two medians that are 16.5 and 4.5 values old to the present, by definition: 1 + 4.5 / 12."""
RUN_LENGTH: Final = 8
"""Successive scores that are summed; engineering choice."""
RUN_CLIP: Final = 3.0
"""Largest share of one score in the sum, as the clip of science.md 1.7."""
RUN_LIMIT: Final = 4.6
"""Standard deviations of the sum that are out of range: 2e-6 of normal sums lie beyond; engineering choice."""
LEVEL_VARIANCE: Final = 1.53 / LEVEL_WINDOW
"""Variance of a median of 32 normal values in sigma squared, which all scores share."""
NEIGHBOUR_MEMORY: Final = 1.0 / 128.0
"""Weight of the newest pair in the share of neighbours on the same side of the level; engineering choice."""
DEPENDENCE_FACTOR: Final = 0.5
"""Widens the limit where neighbours are alike: the scale then rests on few independent values; engineering choice."""
MAX_VALUE: Final = 1e300
"""Values are cut here, so that differences stay finite; engineering choice."""
MAX_SCALED: Final = math.log(MAX_VALUE)


def _cut(value: float) -> float:
    return max(-MAX_VALUE, min(MAX_VALUE, value))


def _half_width(ordered: list[float]) -> float:
    """Standard deviation by the upper half of the noise."""
    middle = quantile(ordered, 0.5)
    widths = [(quantile(ordered, probability) - middle) / score for probability, score in SCALE_POINTS]
    return sum(widths) / len(widths)


def _shapes(ordered: list[float]) -> tuple[float, float]:
    """Tail shape h of Tukey's g-and-h family, of the upper tail and of both together.

    A quantile at normal score z is stretched by exp(h z^2 / 2).
    """
    one = 0.5 * (quantile(ordered, ONE_SIGMA) - quantile(ordered, 1.0 - ONE_SIGMA))
    if one <= 0.0:
        return MAX_TAIL_SHAPE, MAX_TAIL_SHAPE
    count = max(2, math.ceil(2.0 * (1.0 - TAIL_POINTS[0][0]) * len(ordered)) + 1)
    ends = sorted([-value for value in ordered[:count]] + ordered[-count:])
    upper = [(quantile(ordered, probability), score) for probability, score in TAIL_POINTS]
    both = [
        (ends[-1 - round(2.0 * (1.0 - probability) * (len(ordered) - 1))], score)
        for probability, score in (*TAIL_POINTS, FAR_POINT)
    ]
    return _mean_shape(upper, one), _mean_shape(both, one)


def _heavy(shape: float, error: float) -> float:
    """The shape that is used for a measured one: 0 within chance, more than measured where it is significant."""
    sure = (shape / error - HEAVY_ERRORS[0]) / (HEAVY_ERRORS[1] - HEAVY_ERRORS[0])
    return max(0.0, min(1.0, sure)) * (HEAVY_FACTOR * shape + HEAVY_ERRORS_ADDED * error)


def _skew(ordered: list[float]) -> float:
    """Length of the upper side minus the lower one over their sum; 0 for a symmetric law."""
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
    """Factor by which a tail of this shape stretches a quantile beyond its normal score."""
    return math.exp(shape * (score * score - 1.0) / 2.0)


class Baseline(Resumable):
    """Recent accepted values of one series, and the score limits that follow from them."""

    STATE = (
        *("_centre", "_residuals", "_ahead", "_tail", "_levels", "_right", "_rights", "_waiting", "_linear", "_pushed"),
        *("_near", "_level", "_unit", "_shape", "_skew", "limit", "sure_limit", "pair_limit", "run_limit", "_scale"),
        *("_agree", "_side"),
    )
    __slots__ = STATE

    def __init__(self) -> None:
        """Start empty."""
        self._centre = SortedWindow(LEVEL_WINDOW)
        self._levels: deque[float] = deque(maxlen=LEVEL_WINDOW + 1)
        """The last levels; of 33 the first one is the level before the present window."""
        self._right: deque[float] = deque(maxlen=SIDE_WINDOW)
        """The newest values: the right side of the one before them."""
        self._rights: deque[float] = deque(maxlen=SIDE_WINDOW + 2)
        """Medians of the right side; of ten the first one is that of the left side."""
        self._waiting: deque[float] = deque(maxlen=SIDE_WINDOW + 1)
        """Noise factors of the newest values."""
        self._residuals = LazyWindow(NOISE_WINDOW)
        self._ahead = LazyWindow(AHEAD_WINDOW)
        self._tail = LazyWindow(TAIL_WINDOW)
        self._linear = False
        self._pushed = 0
        self._near = self._level = self._shape = self._skew = self._agree = self._side = 0.0
        self._unit = 1.0
        self._scale = math.inf
        self.limit = math.inf
        """Score limit of a single value; infinite until the baseline is ready."""
        self.sure_limit = math.inf
        """Score limit, at most `limit`, for a value that no single sample can cause; see `FastDetector`."""
        self.pair_limit = math.inf
        """Score limit of two successive values."""
        self.run_limit = math.inf
        """Limit of the sum of eight successive clipped scores."""

    @property
    def ready(self) -> bool:
        """Whether enough values were accepted to judge one."""
        return self._scale != math.inf

    @property
    def level(self) -> float | None:
        """Median of the last 32 accepted values; `None` before the first."""
        return self._level if self._centre.ordered else None

    @property
    def recent_level(self) -> float:
        """Median of the last eight accepted values; of fewer, the level."""
        return self._rights[-1] if self._rights else self._level

    @property
    def lift(self) -> float:
        """Extrapolated rise of the last eight accepted values above the level, as a score; 0 within chance."""
        lift = self._scaled(self.recent_level - self._level) / self._scale
        return EXTRAPOLATION * lift if lift > RECENT_MEDIAN_ERROR else 0.0

    @property
    def spread(self) -> float:
        """Upper half-width of the noise in the units of the series; infinite until ready."""
        if self._linear or not self.ready:
            return self._scale
        return math.expm1(min(self._scale, 600.0)) * self._unit

    def score(self, value: float, noise: float = 1.0) -> float:
        """Robust standard deviations above (+) or below (-) the recent level; 0.0 until ready.

        Args:
            value: A finite number.
            noise: Noise of this value relative to the usual one: sqrt(usual / size) for a short batch.
        """
        if self._scale == math.inf:
            return 0.0
        if not -MAX_VALUE <= value <= MAX_VALUE:
            value = _cut(value)
        return self._scaled(value - self._level) / (self._scale * noise)

    def push(self, value: float, noise: float = 1.0) -> None:
        """Accept a finite value as healthy."""
        if not -MAX_VALUE <= value <= MAX_VALUE:
            value = _cut(value)
        if value < 0.0 and not self._linear:
            self._go_linear()
        if len(self._centre.ordered) >= MIN_VALUES:
            self._ahead.push(self._scaled(value - self._forecast()) / noise)
        self._centre.push(value)
        self._follow()
        self._learn(value, noise)
        self._pushed += 1
        if self._pushed % REFIT_EVERY == 0 or self._pushed < REFIT_ALWAYS_UNTIL:
            self._refit()

    def _follow(self) -> None:
        """Update the level and the unit of the logarithmic scale."""
        ordered = self._centre.ordered
        self._level = self._centre.median()
        if len(ordered) == LEVEL_WINDOW:
            self._levels.append(self._level)
        unit = (1.0 + LOG_OFFSET) * self._level
        self._unit = unit if unit > 0.0 else max(0.05 * ordered[-1], 1e-30)

    def _learn(self, value: float, noise: float) -> None:
        """Take in the residual of the value eight pushes ago, now that both its sides are known."""
        right, rights = self._right, self._rights
        self._waiting.append(noise)
        learnt = right[0] if right else 0.0
        right.append(value)
        if len(right) < SIDE_WINDOW:
            return
        ordered = sorted(right)  # inlined median, as this runs for every batch
        rights.append(0.5 * ordered[SIDE_WINDOW // 2 - 1] + 0.5 * ordered[SIDE_WINDOW // 2])
        if len(rights) < SIDE_WINDOW + 2:
            return
        residual = self._scaled(learnt - 0.5 * (rights[0] + rights[-1])) / self._waiting[0]
        side = float((residual > 0.0) - (residual < 0.0))
        self._agree += NEIGHBOUR_MEMORY * (side * self._side - self._agree)
        self._side = side
        self._residuals.push(residual)
        if self._near > 0.0:
            self._tail.push(self._residuals.back(LOCAL_WINDOW // 2) / self._near)

    def rebase(self, values: list[float]) -> None:
        """Make these finite values the new level, such as after a lasting shift."""
        values = [_cut(value) for value in values]
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
        """The level extrapolated from the last two medians; without it a steep fall would pass for noise."""
        if len(self._levels) <= LEVEL_WINDOW:
            return self._level
        return self._level + (self._level - self._levels[0]) * ((LEVEL_WINDOW + 1) / (2 * LEVEL_WINDOW))

    def _scaled(self, difference: float) -> float:
        """A difference from the level on the logarithmic or plain scale."""
        if self._linear:
            return difference
        relative = difference / self._unit
        if relative >= 0.0:
            return log1p(relative) if relative < MAX_VALUE else MAX_SCALED
        return -log1p(-relative) if relative > -MAX_VALUE else -MAX_SCALED

    def _unscaled(self, residual: float) -> float:
        """The difference that `_scaled` maps to this residual on the logarithmic scale."""
        return math.copysign(min(math.expm1(min(abs(residual), 600.0)) * self._unit, MAX_VALUE), residual)

    def _go_linear(self) -> None:
        """Switch to the plain scale, at the first negative value of the series."""
        for window in (self._residuals, self._ahead):
            window.replace([self._unscaled(residual) for residual in window.values()])
        self._linear = True
        self._refit()

    def _refit(self) -> None:
        """Measure the noise and its tail, and set the limits."""
        if len(self._residuals) < MIN_VALUES:
            return
        ordered = self._residuals.ordered
        nearby = sorted(self._residuals.latest(LOCAL_WINDOW))
        if len(nearby) == LOCAL_WINDOW:
            self._near = 0.5 * (quantile(nearby, ONE_SIGMA) - quantile(nearby, 1.0 - ONE_SIGMA))
        floor = max(1e-9 * abs(self._level), 1e-30) if self._linear else 1e-4
        width = max(_half_width(ordered), floor)
        wander = _half_width(self._ahead.ordered) if len(self._ahead) >= MIN_VALUES else 0.0
        self._scale = max(
            RUNNING_LEVEL_FACTOR * width,
            MIN_AHEAD_SHARE * wander,
            MIN_LOCAL_SHARE * self._near,
            MIN_PRESENT_SHARE * self._present(),
        )
        if len(self._tail) < RESHAPE_ALWAYS_UNTIL or self._pushed % RESHAPE_EVERY == 0:
            tail = self._tail.ordered if len(self._tail) >= LOCAL_WINDOW else ordered
            self._shape, self._skew = self._tail_shape(tail), max(0.0, _skew(tail) - SKEW_ERROR / math.sqrt(len(tail)))
        self._set_limits(ordered, nearby[-1])

    def _tail_shape(self, tail: list[float]) -> float:
        """Tail shape h including its uncertainty; 0 for a normal tail."""
        root = math.sqrt(len(tail))
        upper, both = _shapes(tail)
        heavy = (_heavy(upper, UPPER_SHAPE_ERROR / root), _heavy(both, BOTH_SHAPE_ERROR / root))
        young = max(0.0, 1.0 - len(tail) / RESIDUALS_FOR_NORMAL)
        allowed = young * (HEAVY_FACTOR * max(0.0, upper, both) + EARLY_ERRORS_ADDED * BOTH_SHAPE_ERROR / root)
        return min(MAX_TAIL_SHAPE, max(min(MAX_EARLY_SHAPE, allowed), *heavy))

    def _set_limits(self, ordered: list[float], top: float) -> None:
        shape = self._shape
        agree = max(0.0, math.sin(0.5 * math.pi * self._agree))
        few = 1.0 + DEPENDENCE_FACTOR * agree * agree
        normal = (PLAIN_LIMIT if self._linear else NORMAL_LIMIT) * (1.0 + self._skew)
        self.limit = few * min(normal * _stretch(NORMAL_LIMIT, shape), self._beyond(ordered))
        self.sure_limit = min(self.limit, few * self._surely(top))
        pair = PAIR_LIMIT * _stretch(PAIR_LIMIT, shape)
        self.pair_limit = min(self.limit, pair + min(1.0, 2.0 * agree) * (self.limit - pair))
        alike = sum((RUN_LENGTH - lag) * agree**lag for lag in range(1, RUN_LENGTH)) if agree > 0.0 else 0.0
        self.run_limit = (
            RUN_LIMIT * (1.0 + agree) * math.sqrt(RUN_LENGTH + 2.0 * alike + RUN_LENGTH * RUN_LENGTH * LEVEL_VARIANCE)
        )

    def _present(self) -> float:
        """Half-width of the detrended values in the level window; it follows growing noise at once."""
        fall = self._levels[0] - self._level if len(self._levels) > LEVEL_WINDOW else 0.0
        return self._scaled(self._centre.quantile(ONE_SIGMA) - self._level - TREND_SHARE * max(0.0, fall))

    def _beyond(self, ordered: list[float]) -> float:
        """Score that is out of range for any tail: far beyond all values seen."""
        factor = FAR_BEYOND_FACTOR + FAR_BEYOND_EARLY / len(ordered)
        top = max(ordered[-1], self._ahead.ordered[-1] if self._ahead.ordered else 0.0)
        return max(NORMAL_LIMIT, self._times(top, factor))

    def _surely(self, top: float) -> float:
        """Score that is out of range on the logarithmic scale, whose tails are light."""
        if self._linear:
            return math.inf
        surely = LOG_LIMIT + LOG_LIMIT_EARLY / math.sqrt(len(self._residuals))
        return max(surely, MIN_LOG_RISE / self._scale, self._times(top, NEAR_TOP_FACTOR))

    def _times(self, residual: float, factor: float) -> float:
        """Score of a value `factor` times as far from the level as this residual."""
        residual = max(0.0, residual)
        if self._linear:
            return factor * residual / self._scale
        return log1p(factor * math.expm1(min(residual, 600.0))) / self._scale
