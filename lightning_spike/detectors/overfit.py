"""Overfitting: the validation loss turns up while the training loss goes on falling.

After Prechelt, "Early Stopping - But When?" (1998): GL is the percentage by which the validation loss is above its
best, P_k says how much the training loss still moves, PQ is their quotient, UP_s counts rises in a row. Validation
curves are noisy and have many
local minima, so none of these is believed alone: what is asked is a rise of the smoothed curve by several times the
noise of the curve itself, over at least three validations, with a training loss that is lower than at the best point
and a gap that grows.
"""

import math
from typing import Any, Final

from lightning_spike.detectors.draft import moment_state, restored_moment
from lightning_spike.records import Finding, Moment, ValidationPoint
from lightning_spike.rolling import MAD_TO_SIGMA, median, theil_sen

HISTORY: Final = 64
"""Validations kept."""
SMOOTH: Final = 3
"""Validations per running median."""
STRIPS: Final = 3
"""Rises in a row, UP_3: the best trade-off of Prechelt's 1,296 runs (with UP_4, UP_6)."""
STRIP: Final = 5
"""Validations over which P_k and the slope of the gap are taken: Prechelt's k = 5."""
SURE: Final = 4.0
"""Noise standard deviations that the smoothed curve must have risen; the best of many looks better than it is."""
FEW: Final = 8.0
"""The noise estimated from this many validations is doubled, from more it is widened less: it may be too small by
chance."""
LEAST_GL: Final = 2.0
"""Per cent above the best below which nothing is said; Prechelt's thresholds for GL go from 1 to 5."""
SWINGS: Final = 2.0
"""Ratio of the training loss's residual variance, newest quarter to the quarter before, from which swings widen
(science.md 5)."""


def _noise(values: list[float]) -> float:
    """Standard deviation of the noise around a smooth course, from second differences."""
    bends = [abs(a - 2.0 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return median(bends) * MAD_TO_SIGMA / math.sqrt(6.0) if bends else math.inf


def _smoothed(values: list[float]) -> list[float]:
    """Running median of the last three, as far as there are."""
    return [median(values[max(0, end - SMOOTH) : end]) for end in range(1, len(values) + 1)]


def _bend_variance(values: list[float]) -> float:
    bends = [a - 2.0 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return sum(bend * bend for bend in bends) / len(bends)


class OverfitDetector:
    """Watches one validation loss, lower is better.

    Findings (detector `"overfit"`):

    - `"gap_growing"`, once per overfit, when it is noticed. Detail: `metric`, `best_step` and `best_ordinal` (the best
      validation), `best_value`, `value`, `gl` (per cent above the best), `pq` (GL / P_5; `None` where the training loss
      stands still), `up` (rises in a row of the smoothed curve), `gap` (validation minus training loss), `gap_slope`
      (its change per validation), `train_loss`, `train_at_best`, `noise` (standard deviation of the curve).
    - `"widening_swings"`, once, while overfit: the training loss has begun to swing. Detail: `metric`, `best_step`,
      `ratio` (residual variance, newest quarter to the one before), `train_loss`.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._points: list[tuple[Moment, float, float | None]] = []
        self._swinging = False
        self.overfit = False
        """The validation loss is above its best and the gap is growing, by the last validation seen."""
        self.best: Moment | None = None
        """The best validation: where the overfit began, while `overfit`."""
        self.best_value: float | None = None
        self.rise = 0.0
        """How far the smoothed curve is above its best, in standard deviations of its noise."""

    def observe(self, point: ValidationPoint) -> list[Finding]:
        """Judge one validation; one that is not finite is passed over."""
        if not math.isfinite(point.value):
            return []
        train = point.train_loss if point.train_loss is not None and math.isfinite(point.train_loss) else None
        self._points = [*self._points, (point.at, point.value, train)][-HISTORY:]
        if self.overfit:
            self._watch(point.value)
        if self.overfit:
            return self._swings(point)
        return self._look(point)

    def _watch(self, value: float) -> None:
        if self.best_value is not None and value <= self.best_value:
            self.overfit = self._swinging = False

    def _look(self, point: ValidationPoint) -> list[Finding]:
        values = [value for _, value, _ in self._points]
        smooth = _smoothed(values)
        place = min(range(len(smooth)), key=smooth.__getitem__)
        best = min(range(max(0, place - SMOOTH + 1), place + 1), key=values.__getitem__)
        noise = _noise(values) * (1.0 + FEW / len(values))
        rise = smooth[-1] - smooth[place]
        self.rise = rise / noise if noise > 0.0 else math.copysign(99.0, rise)
        up = self._rises(smooth)
        if len(values) - 1 - place < STRIPS or not rise > SURE * noise or up < STRIPS:
            return []
        floor = abs(values[best])
        gl = 100.0 * (values[-1] - values[best]) / floor if floor > 0.0 else 100.0
        pairs = [(value, train) for _, value, train in self._points if train is not None]
        train_at_best = self._points[best][2]
        if gl < LEAST_GL or len(pairs) < STRIP or train_at_best is None:
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
        if ratio <= SWINGS**2 or self.best is None:
            return []
        self._swinging = True
        detail = {"metric": point.metric, "best_step": self.best.step, "ratio": ratio, "train_loss": trains[-1]}
        return [Finding(detector="overfit", kind="widening_swings", at=point.at, detail=detail)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "points": [[*moment_state(at), value, train] for at, value, train in self._points],
            "swinging": self._swinging,
            "overfit": self.overfit,
            "best": None if self.best is None else moment_state(self.best),
            "best_value": self.best_value,
            "rise": self.rise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._points = [(restored_moment(row[:4]), row[4], row[5]) for row in state["points"]]
        self._swinging = state["swinging"]
        self.overfit = state["overfit"]
        self.best = None if state["best"] is None else restored_moment(state["best"])
        self.best_value = state["best_value"]
        self.rise = state["rise"]
