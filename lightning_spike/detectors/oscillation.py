"""Swings: the loss goes up and down by several times its usual noise, again and again.

Every 16 losses the spread (10th to 90th percentile) of the last 64 is compared with what it was before. A burst also
widens the spread, but crosses the middle twice; spikes in a row cross it often, but most losses between them are low.
Swings cross it often and spend their time on both sides.
"""

import math
from typing import Any, Final

from lightning_spike.rolling import median, quantile

BLOCK: Final = 16
WINDOW: Final = 64
"""Losses that are judged together: swings of up to 25 batches cross the middle five times in it."""
HISTORY: Final = 20
"""Spreads that are remembered."""
LAG: Final = 4
"""Youngest spreads left out of the reference: they overlap with the window that is judged."""
LEAST_HISTORY: Final = 6
OFFSET: Final = 0.25
"""Share of the middle that is added before the logarithm (science.md 1.5)."""
WIDER: Final = 3.0
"""Times the usual spread from which it is called a swing; science.md 1.8 takes a variance ratio of 4 (2 in spread) as a
hint."""
PLAIN: Final = 2.0
"""Times the usual spread on the plain scale as well: noise that stays while the level falls is no swing."""
CALMER: Final = 1.6
"""Times the usual spread below which the swings are over."""
FAR: Final = 1.2
"""Usual spreads from the usual middle beyond which a loss may be the first of the swings: three standard deviations."""
CLOSE: Final = 16
"""Losses of which a quarter must be as far for it to be the first."""
LEAST_SPREAD: Final = 0.15
"""Spread, as a share of the level, that matters at all."""
LEAST_CROSSINGS: Final = 5
LEAST_HIGH: Final = 0.2
"""Share of the losses in the upper third of the range."""
MOST_LOW: Final = 0.65
"""Share of the losses in the lower third."""


def _crossings(values: list[float], low: float, high: float) -> tuple[int, float, float]:
    """How often the series goes from below `low` to above `high` or back; shares above `high` and below `low`."""
    side = crossings = highs = lows = 0
    for value in values:
        now = 1 if value > high else -1 if value < low else 0
        highs += now == 1
        lows += now == -1
        if now and now != side:
            crossings += side != 0
            side = now
    return crossings, highs / len(values), lows / len(values)


class SwingDetector:
    """Compares the spread of the last 64 losses with that before; `raised` while they swing."""

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
        return self._watch() if self.raised else self._look()

    def _reference(self) -> tuple[float, float, float] | None:
        """Usual spread on the scale, usual spread as it is, usual middle on the scale."""
        older = self._history[:-LAG]
        if len(older) < LEAST_HISTORY:
            return None
        return (
            median([spread for spread, _, _ in older]),
            median([plain for _, plain, _ in older]),
            median([middle for _, _, middle in older[-LEAST_HISTORY:]]),
        )

    def _choose_scale(self, ordered: list[float]) -> float:
        """Share of the middle that is added before the logarithm.

        A loss that is not positive ends the logarithmic scale for good.
        """
        middle = quantile(ordered, 0.5)
        if self._logarithmic and (ordered[0] < 0.0 or middle <= 0.0):
            self._logarithmic = False
            self._history.clear()
        return OFFSET * middle

    def _scaled(self, value: float, offset: float) -> float:
        return math.log(value + offset) if self._logarithmic else value

    def _look(self) -> int | None:
        ordered = sorted(self._window)
        offset = self._choose_scale(ordered)
        low, middle, high = (quantile(ordered, probability) for probability in (0.1, 0.5, 0.9))
        ends = self._scaled(low, offset), self._scaled(high, offset)
        reference = self._reference() if ends[1] - ends[0] > self._least(middle) else None
        if reference is None or high - low < PLAIN * reference[1] or not self._swings(offset, *ends, reference[0]):
            self._history.append([ends[1] - ends[0], high - low, self._scaled(middle, offset)])
            del self._history[:-HISTORY]
            return None
        self.raised = True
        usual, _, usual_middle = reference
        far = [abs(self._scaled(value, offset) - usual_middle) > FAR * usual for value in self._window]
        first = next(
            (place for place in range(len(far)) if far[place] and sum(far[place : place + CLOSE]) >= CLOSE // 4), 0
        )
        return len(far) - 1 - first

    def _least(self, middle: float) -> float:
        return LEAST_SPREAD * (1.0 if self._logarithmic else abs(middle))

    def _swings(self, offset: float, low: float, high: float, usual: float) -> bool:
        spread = high - low
        if spread <= WIDER * usual:
            return False
        values = [self._scaled(value, offset) for value in self._window]
        crossings, above, below = _crossings(values, low + 0.35 * spread, high - 0.35 * spread)
        return crossings >= LEAST_CROSSINGS and above >= LEAST_HIGH and below <= MOST_LOW

    def _watch(self) -> int | None:
        reference = self._reference()
        offset = self._choose_scale(sorted(self._window))
        recent = sorted(self._window[-2 * BLOCK :])
        spread = self._scaled(quantile(recent, 0.9), offset) - self._scaled(quantile(recent, 0.1), offset)
        if reference is None or spread < CALMER * reference[0]:
            self.raised = False
        return None

    def rebase(self) -> None:
        """Take the swings as they are for the usual noise."""
        self.raised = False
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "window": list(self._window),
            "history": [list(entry) for entry in self._history],
            "logarithmic": self._logarithmic,
            "raised": self.raised,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._window = list(state["window"])
        self._history = [list(entry) for entry in state["history"]]
        self._logarithmic = state["logarithmic"]
        self.raised = state["raised"]
