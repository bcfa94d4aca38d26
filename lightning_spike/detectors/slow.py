"""The slow detector: has the level crept up in a way that the fast one gets used to?

Works on medians of 16 losses, flagged ones included: a CUSUM of their distance from the level of some blocks ago, in
units of the spread between blocks. A falling loss keeps the sum at zero, a heavy tail does not move a median, and the
clip keeps one block from ringing alone.
"""

import math
from typing import Any, Final

from lightning_spike.rolling import MAD_TO_SIGMA, Cusum, median, median_error

HISTORY: Final = 32
"""Blocks of 16 losses that make the reference and the spread."""
REFERENCE: Final = 16
"""Blocks whose median is the level before."""
LEAST_BLOCKS: Final = 6
SLACK: Final = 1.0
CLIP: Final = 3.0
ALARM: Final = 8.0
"""k = 1, h = 8 on clipped scores: Siegmund gives 4.6e7 blocks to a false alarm for normal noise; the spread is only
estimated."""
UNSURE: Final = 1.0
"""Relative standard error of the spread times the square root of the number of blocks; their spread is widened by
it."""
LEAST_SPREAD: Final = 1e-3
"""Share of the level below which a spread is not believed."""
LEAST_RISE: Final = 0.15
"""Share of the reference by which the level must have risen to matter."""
SETTLED: Final = 16
"""Blocks without a further rise after which a raised level is the new reference."""


EARLY: Final = 8
"""First blocks of a run whose lowest is remembered: a rate that is too high lets the loss fall for some batches, then
throws it back."""
EARLY_WATCH: Final = 24
"""Blocks from the start within which the loss is compared with it."""
LOST: Final = 4
"""Blocks whose median is the level that is compared."""
CLEARLY: Final = 5.0
"""Standard errors of a block's median that this level must lie above the lowest."""


def _spread(blocks: list[float]) -> float:
    """Standard deviation of block medians, from differences one and four blocks apart.

    A wandering level widens the latter.
    """
    spreads = [
        median([abs(later - earlier) for earlier, later in zip(blocks, blocks[lag:], strict=False)])
        * MAD_TO_SIGMA
        / math.sqrt(2.0)
        for lag in (1, 4)
        if len(blocks) > lag
    ]
    return max(spreads, default=0.0)


class SlowDetector:
    """Compares the level of the last blocks with that before; `raised` while it is up."""

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: list[float] = []
        self._pending: list[float] = []
        self._cusum = Cusum(slack=SLACK, clip=CLIP)
        self.raised = False
        self.reference: float | None = None
        """The level before the rise; set while `raised`."""
        self._top = -math.inf
        self._since_top = 0
        self._early: list[list[float]] = []
        """Median and standard error of the first blocks."""

    def push(self, block: list[float], middle: float) -> bool:
        """Take the next 16 finite losses and their median; true when a rise has just been noticed."""
        if self.raised:
            return self._watch(middle)
        return self._look(middle) or (len(self._early) < EARLY_WATCH and self._fell_back(middle, median_error(block)))

    def _fell_back(self, block: float, error: float) -> bool:
        """Whether a young run has lost for good what it had learned.

        Too early for the sum, which needs a level to compare with.
        """
        self._early.append([block, error])
        if len(self._early) < LOST + 2:
            return False
        best, its_error = min(self._early[: min(EARLY, len(self._early) - LOST)])
        recent = self._early[-LOST:]
        level = median(value for value, _ in recent)
        unit = max(its_error, median(error for _, error in recent))
        if level - best <= max(CLEARLY * unit, LEAST_RISE * abs(best)):
            return False
        self._early = [[0.0, 0.0] for _ in range(EARLY_WATCH)]
        self.raised, self.reference = True, best
        self._top, self._since_top = block, 0
        self._pending = [value for value, _ in recent]
        return True

    def _look(self, block: float) -> bool:
        if len(self._blocks) < LEAST_BLOCKS:
            self._blocks.append(block)
            return False
        reference = median(self._blocks[-REFERENCE:])
        total = self._cusum.push(self._distance(block, reference))
        self._pending.append(block)
        if total == 0.0:
            self._blocks = (self._blocks + self._pending)[-HISTORY:]
            self._pending.clear()
        elif total >= ALARM and median(self._pending[-2:]) - reference > LEAST_RISE * abs(reference):
            self.raised, self.reference = True, reference
            self._top, self._since_top = block, 0
            return True
        elif len(self._pending) > HISTORY:
            self.rebase()
        return False

    def _distance(self, block: float, reference: float) -> float:
        """How far a block lies above the reference.

        On the logarithmic scale while all are positive, medians of heavy tails have a tail.
        """
        doubtful = 1.0 + UNSURE / math.sqrt(len(self._blocks))
        if min(block, reference, *self._blocks) > 0.0:
            unit = max(_spread([math.log(value) for value in self._blocks]), LEAST_SPREAD)
            return (math.log(block) - math.log(reference)) / (doubtful * unit)
        unit = max(_spread(self._blocks), LEAST_SPREAD * abs(reference), 1e-30)
        return (block - reference) / (doubtful * unit)

    def _watch(self, block: float) -> bool:
        self._pending = [*self._pending, block][-HISTORY:]
        reference = self.reference or 0.0
        unit = _spread(self._blocks)
        if block > self._top + unit:
            self._top, self._since_top = block, 0
        else:
            self._since_top += 1
        back = median(self._pending[-2:]) - reference <= max(2.0 * unit, 0.25 * (self._top - reference))
        if back or self._since_top >= SETTLED:
            self.rebase()
        return False

    def rebase(self) -> None:
        """Take the level as it is now for the reference."""
        self._blocks = (self._pending or self._blocks)[-LEAST_BLOCKS:]
        self._pending.clear()
        self._cusum.total = 0.0
        self.raised, self.reference = False, None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "blocks": list(self._blocks),
            "pending": list(self._pending),
            "cusum": self._cusum.total,
            "raised": self.raised,
            "reference": self.reference,
            "top": self._top,
            "since_top": self._since_top,
            "early": [list(entry) for entry in self._early],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._blocks = list(state["blocks"])
        self._pending = list(state["pending"])
        self._cusum.total = state["cusum"]
        self.raised = state["raised"]
        self.reference = state["reference"]
        self._top = state["top"]
        self._since_top = state["since_top"]
        self._early = [list(entry) for entry in state["early"]]
