"""Overfitting: the validation loss turns up while the training loss goes on falling.

After Prechelt, "Early Stopping - But When?" (1998): GL is the percentage by which the validation loss is above its
best, P_k measures how much the training loss still moves, PQ is their quotient, UP_s counts rises in a row. Validation
curves are noisy and have many local minima, so none of these suffices alone. Required is a rise of the smoothed curve
by several times its noise, over at least three validations, with a training loss below that at the best point and a
growing gap.
"""

import math
from typing import Any, Final

from typing_extensions import override

from lightning_spike.detectors.draft import moment_state, restored_moment
from lightning_spike.detectors.noise import bend_noise, bends
from lightning_spike.detectors.resumable import Resumable
from lightning_spike.records import Finding, Moment, ValidationPoint
from lightning_spike.rolling import median, theil_sen

MAX_POINTS: Final = 64
"""Validations kept; engineering choice."""
SMOOTHING: Final = 3
"""Validations per running median; engineering choice."""
MIN_RISES: Final = 3
"""Rises in a row, UP_3: the best trade-off of Prechelt's 1,296 runs, with UP_4 and UP_6 (1998)."""
STRIP: Final = 5
"""Validations for P_k and the slope of the gap: Prechelt's k (1998)."""
RISE_ERRORS: Final = 4.0
"""Noise standard deviations that the smoothed curve must have risen: the best of many is selected;
engineering choice."""
EARLY_ERRORS: Final = 8.0
"""Widens the noise by this over the number of validations, as few can underestimate it; engineering choice."""
MIN_GL: Final = 2.0
"""Smallest GL, per cent above the best; Prechelt's thresholds (1998) go from 1 to 5."""
SWING_FACTOR: Final = 2.0
"""Ratio of the training loss's residual spread, newest quarter to the one before, from which swings widen (science.md
5)."""


def _smoothed(values: list[float]) -> list[float]:
    """Running median of up to three values."""
    return [median(values[max(0, end - SMOOTHING) : end]) for end in range(1, len(values) + 1)]


def _bend_variance(values: list[float]) -> float:
    found = bends(values)
    return sum(bend * bend for bend in found) / len(found)


class OverfitDetector(Resumable):
    """Watches one validation loss, lower is better.

    Findings (detector `"overfit"`):

    - `"gap_growing"`, once per overfit, when it is noticed. Detail: `metric`, `best_step` and `best_ordinal` (the best
      validation), `best_value`, `value`, `gl` (per cent above the best), `pq` (GL / P_5; `None` where the training loss
      stands still), `up` (rises in a row of the smoothed curve), `gap` (validation minus training loss), `gap_slope`
      (its change per validation), `train_loss`, `train_at_best`, `noise` (standard deviation of the curve).
    - `"widening_swings"`, once, while overfit: the training loss has begun to swing. Detail: `metric`, `best_step`,
      `ratio` (residual variance, newest quarter to the one before), `train_loss`.
    """

    STATE = ("_swinging", "overfit", "best_value", "rise")

    def __init__(self) -> None:
        """Start empty."""
        self._points: list[tuple[Moment, float, float | None]] = []
        self._swinging = False
        self.overfit = False
        """Whether the validation loss is above its best and the gap grows, by the last validation."""
        self.best: Moment | None = None
        """The best validation: where the overfit began, while `overfit`."""
        self.best_value: float | None = None
        self.rise = 0.0
        """Rise of the smoothed curve above its best, in standard deviations of its noise."""

    def observe(self, point: ValidationPoint) -> list[Finding]:
        """Judge one validation; a non-finite one is ignored."""
        if not math.isfinite(point.value):
            return []
        train = point.train_loss if point.train_loss is not None and math.isfinite(point.train_loss) else None
        self._points = [*self._points, (point.at, point.value, train)][-MAX_POINTS:]
        if self.overfit and self.best_value is not None and point.value <= self.best_value:
            self.overfit = self._swinging = False
        return self._swings(point) if self.overfit else self._look(point)

    def _look(self, point: ValidationPoint) -> list[Finding]:
        values = [value for _, value, _ in self._points]
        smooth = _smoothed(values)
        place = min(range(len(smooth)), key=smooth.__getitem__)
        best = min(range(max(0, place - SMOOTHING + 1), place + 1), key=values.__getitem__)
        noise = bend_noise(values) * (1.0 + EARLY_ERRORS / len(values))
        rise = smooth[-1] - smooth[place]
        self.rise = rise / noise if noise > 0.0 else math.copysign(99.0, rise)
        up = self._rises(smooth)
        if len(values) - 1 - place < MIN_RISES or not rise > RISE_ERRORS * noise or up < MIN_RISES:
            return []
        floor = abs(values[best])
        gl = 100.0 * (values[-1] - values[best]) / floor if floor > 0.0 else 100.0
        pairs = [(value, train) for _, value, train in self._points if train is not None]
        train_at_best = self._points[best][2]
        if gl < MIN_GL or len(pairs) < STRIP or train_at_best is None:
            return []
        trains = [train for _, train in pairs][-STRIP:]
        gap_slope = theil_sen([value - train for value, train in pairs][-STRIP:])
        if not (theil_sen(trains) < 0.0 and trains[-1] < train_at_best and gap_slope > 0.0):
            return []
        self.overfit, self.best, self.best_value = True, self._points[best][0], values[best]
        least = min(trains)
        progress = 1000.0 * (sum(trains) / (len(trains) * least) - 1.0) if least > 0.0 else 0.0
        detail = {
            "metric": point.metric,
            "best_step": self.best.step,
            "best_ordinal": self.best.ordinal,
            "best_value": values[best],
            "value": point.value,
            "gl": gl,
            "pq": gl / progress if progress > 0.0 else None,
            "up": up,
            "gap": pairs[-1][0] - pairs[-1][1],
            "gap_slope": gap_slope,
            "train_loss": trains[-1],
            "train_at_best": train_at_best,
            "noise": noise,
        }
        return [Finding(detector="overfit", kind="gap_growing", at=point.at, detail=detail)]

    @staticmethod
    def _rises(smooth: list[float]) -> int:
        rises = 0
        for earlier, later in zip(reversed(smooth[:-1]), reversed(smooth[1:]), strict=True):
            if later < earlier:
                break
            rises += later > earlier
        return rises

    def _swings(self, point: ValidationPoint) -> list[Finding]:
        trains = [train for _, _, train in self._points if train is not None]
        quarter = len(trains) // 4
        if self._swinging or quarter < STRIP:
            return []
        before = _bend_variance(trains[-2 * quarter : -quarter])
        ratio = _bend_variance(trains[-quarter:]) / before if before > 0.0 else 0.0
        if ratio <= SWING_FACTOR**2 or self.best is None:
            return []
        self._swinging = True
        detail = {"metric": point.metric, "best_step": self.best.step, "ratio": ratio, "train_loss": trains[-1]}
        return [Finding(detector="overfit", kind="widening_swings", at=point.at, detail=detail)]

    @override
    def state_dict(self) -> dict[str, Any]:
        points = [[*moment_state(at), value, train] for at, value, train in self._points]
        best = None if self.best is None else moment_state(self.best)
        return super().state_dict() | {"points": points, "best": best}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._points = [(restored_moment(row[:4]), row[4], row[5]) for row in state["points"]]
        self.best = None if state["best"] is None else restored_moment(state["best"])
