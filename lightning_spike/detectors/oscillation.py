"""Swings: the loss repeatedly rises and falls by several times its usual noise.

Every 16 losses, the spread (10th to 90th percentile) of the last 64 is compared with the spread before. A burst also
widens the spread, but crosses the middle twice. Spikes in a row cross it often, but most losses between them are low.
Swings cross it often and spend their time on both sides.
"""

import itertools
import math
from typing import Final

from lightning_spike.detectors.resumable import Resumable
from lightning_spike.rolling import median, quantile

WINDOW: Final = 64
"""Losses that are judged together: swings of up to 25 batches cross the middle five times; engineering choice."""
RECENT: Final = 32
"""Newest losses that show whether the swings are over; engineering choice."""
MAX_SPREADS: Final = 20
"""Spreads that are remembered; engineering choice."""
LAG: Final = 4
"""Youngest spreads outside the reference: they overlap with the judged window; engineering choice."""
MIN_SPREADS: Final = 6
"""Spreads in a reference; engineering choice."""
LOG_OFFSET: Final = 0.25
"""Share of the middle that is added before the logarithm (science.md 1.5)."""
SWING_FACTOR: Final = 3.0
"""Times the usual spread that is a swing; science.md 1.8 suggests a variance ratio of 4, 2 in spread."""
PLAIN_FACTOR: Final = 2.0
"""Times the usual spread on the plain scale as well: constant noise on a falling level is no swing;
engineering choice."""
END_FACTOR: Final = 1.6
"""Times the usual spread below which the swings are over; engineering choice."""
ONSET_DISTANCE: Final = 1.2
"""Usual spreads from the usual middle at which the first swing can begin: three standard deviations;
engineering choice."""
ONSET_LOSSES: Final = 16
"""Losses of which a quarter must lie as far out; engineering choice."""
MIN_SPREAD: Final = 0.15
"""Smallest spread as a share of the level; engineering choice."""
MIN_CROSSINGS: Final = 5
"""Smallest number of crossings of the middle; engineering choice."""
MIN_UPPER_SHARE: Final = 0.2
"""Smallest share of losses in the upper third of the range; engineering choice."""
MAX_LOWER_SHARE: Final = 0.65
"""Largest share of losses in the lower third; engineering choice."""


def _crossings(values: list[float], low: float, high: float) -> tuple[int, float, float]:
    """Crossings between below `low` and above `high`, share of values above `high`, share below `low`."""
    sides = [(value > high) - (value < low) for value in values]
    outside = [side for side in sides if side]
    crossings = sum(before != after for before, after in itertools.pairwise(outside))
    return crossings, sides.count(1) / len(values), sides.count(-1) / len(values)


class SwingDetector(Resumable):
    """Compares the spread of the last 64 losses with the spread before; `raised` while they swing."""

    STATE = ("_window", "_history", "_logarithmic", "raised")

    def __init__(self) -> None:
        """Start empty."""
        self._window: list[float] = []
        self._history: list[list[float]] = []
        self._logarithmic = True
        self.raised = False

    def push(self, block: list[float]) -> int | None:
        """Take the next 16 finite losses.

        Returns:
            When swings have just been noticed: how many losses ago they began (0 for the last one); else `None`.
        """
        self._window += block
        if len(self._window) < WINDOW:
            return None
        del self._window[:-WINDOW]
        if self.raised:
            self._watch()
            return None
        return self._look()

    def _reference(self) -> tuple[float, float, float] | None:
        """Usual spread on the scale, usual plain spread, usual middle on the scale."""
        older = self._history[:-LAG]
        if len(older) < MIN_SPREADS:
            return None
        spreads, plain, middles = zip(*older, strict=True)
        return median(spreads), median(plain), median(middles[-MIN_SPREADS:])

    def _choose_scale(self, ordered: list[float]) -> float:
        """The offset for the logarithm; a negative loss ends the logarithmic scale for good."""
        middle = quantile(ordered, 0.5)
        if self._logarithmic and (ordered[0] < 0.0 or middle <= 0.0):
            self._logarithmic = False
            self._history.clear()
        return LOG_OFFSET * middle

    def _scaled(self, value: float, offset: float) -> float:
        return math.log(value + offset) if self._logarithmic else value

    def _look(self) -> int | None:
        ordered = sorted(self._window)
        offset = self._choose_scale(ordered)
        low, middle, high = (quantile(ordered, probability) for probability in (0.1, 0.5, 0.9))
        ends = self._scaled(low, offset), self._scaled(high, offset)
        least = MIN_SPREAD * (1.0 if self._logarithmic else abs(middle))
        reference = self._reference() if ends[1] - ends[0] > least else None
        if (
            reference is None
            or high - low < PLAIN_FACTOR * reference[1]
            or not self._swings(offset, *ends, reference[0])
        ):
            self._history.append([ends[1] - ends[0], high - low, self._scaled(middle, offset)])
            del self._history[:-MAX_SPREADS]
            return None
        self.raised = True
        usual, _, usual_middle = reference
        far = [abs(self._scaled(value, offset) - usual_middle) > ONSET_DISTANCE * usual for value in self._window]
        enough = (far[k] and sum(far[k : k + ONSET_LOSSES]) >= ONSET_LOSSES // 4 for k in range(len(far)))
        first = next((k for k, begins in enumerate(enough) if begins), 0)
        return len(far) - 1 - first

    def _swings(self, offset: float, low: float, high: float, usual: float) -> bool:
        spread = high - low
        if spread <= SWING_FACTOR * usual:
            return False
        values = [self._scaled(value, offset) for value in self._window]
        crossings, above, below = _crossings(values, low + 0.35 * spread, high - 0.35 * spread)
        return crossings >= MIN_CROSSINGS and above >= MIN_UPPER_SHARE and below <= MAX_LOWER_SHARE

    def _watch(self) -> None:
        reference = self._reference()
        offset = self._choose_scale(sorted(self._window))
        recent = sorted(self._window[-RECENT:])
        spread = self._scaled(quantile(recent, 0.9), offset) - self._scaled(quantile(recent, 0.1), offset)
        if reference is None or spread < END_FACTOR * reference[0]:
            self.raised = False

    def rebase(self) -> None:
        """Make the present swings the usual noise."""
        self.raised = False
        self._history.clear()
