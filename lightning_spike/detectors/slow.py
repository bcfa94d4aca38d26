"""Slow detector: finds a level that creeps up, to which the fast detector adapts.

Works on medians of 16 losses, flagged ones included: a CUSUM of their distance from an earlier level, in units of the
spread between blocks. A falling loss keeps the sum at zero, a heavy tail does not move a median, and the clip keeps one
block from an alarm.
"""

import math
from typing import Final

from lightning_spike.detectors.resumable import Resumable
from lightning_spike.rolling import MAD_TO_SIGMA, median, median_error

MAX_BLOCKS: Final = 32
"""Blocks of 16 losses in the reference and its spread; engineering choice."""
REFERENCE_BLOCKS: Final = 16
"""Blocks whose median is the reference; engineering choice."""
MIN_BLOCKS: Final = 6
"""Blocks before any is judged; engineering choice."""
SLACK: Final = 1.0
"""Slack k of the CUSUM, science.md 1.6."""
CLIP: Final = 3.0
"""Clip of the CUSUM's scores, science.md 1.6."""
ALARM: Final = 8.0
"""Threshold h of the CUSUM: for k = 1, Siegmund gives 4.6e7 blocks to a false alarm of normal noise (science.md
1.7)."""
SPREAD_ERROR: Final = 1.0
"""Relative standard error of the spread times the root of the number of blocks; it widens the spread;
engineering choice."""
MIN_SPREAD: Final = 1e-3
"""Smallest spread as a share of the level; engineering choice."""
MIN_RISE: Final = 0.15
"""Smallest rise as a share of the reference; engineering choice."""
SETTLED_BLOCKS: Final = 16
"""Blocks without a further rise after which a raised level is the new reference; engineering choice."""
EARLY_BLOCKS: Final = 8
"""First blocks of a run, whose lowest is remembered: a learning rate that is too high can undo the first progress;
engineering choice."""
EARLY_WATCH: Final = 24
"""Blocks from the start that are compared with that lowest one; engineering choice."""
LOST_BLOCKS: Final = 4
"""Blocks whose median is compared; engineering choice."""
LOST_ERRORS: Final = 5.0
"""Standard errors of a block's median that the median must lie above the lowest block; engineering choice."""


def _spread(blocks: list[float]) -> float:
    """Standard deviation of block medians, the larger of those from differences one and four blocks apart."""
    lagged = [zip(blocks, blocks[lag:], strict=False) for lag in (1, 4) if len(blocks) > lag]
    spreads = [median(abs(later - earlier) for earlier, later in pairs) for pairs in lagged]
    return max(spreads, default=0.0) * MAD_TO_SIGMA / math.sqrt(2.0)


class SlowDetector(Resumable):
    """Compares the level of the last blocks with the level before; `raised` while it is higher."""

    STATE = ("_blocks", "_pending", "_cusum", "raised", "reference", "_top", "_since_top", "_early")

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: list[float] = []
        self._pending: list[float] = []
        self._cusum = 0.0
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
        """Whether a young run has lost its first progress, too early for the CUSUM."""
        self._early.append([block, error])
        if len(self._early) < LOST_BLOCKS + 2:
            return False
        best, its_error = min(self._early[: min(EARLY_BLOCKS, len(self._early) - LOST_BLOCKS)])
        recent = self._early[-LOST_BLOCKS:]
        level = median(value for value, _ in recent)
        unit = max(its_error, median(error for _, error in recent))
        if level - best <= max(LOST_ERRORS * unit, MIN_RISE * abs(best)):
            return False
        self._early = [[0.0, 0.0] for _ in range(EARLY_WATCH)]
        self._pending = [value for value, _ in recent]
        return self._raise(block, best)

    def _raise(self, block: float, reference: float) -> bool:
        self.raised, self.reference, self._top, self._since_top = True, reference, block, 0
        return True

    def _look(self, block: float) -> bool:
        if len(self._blocks) < MIN_BLOCKS:
            self._blocks.append(block)
            return False
        reference = median(self._blocks[-REFERENCE_BLOCKS:])
        score = max(-CLIP, min(CLIP, self._distance(block, reference)))
        self._cusum = max(0.0, self._cusum + score - SLACK)  # Page 1954
        self._pending.append(block)
        if self._cusum == 0.0:
            self._blocks = (self._blocks + self._pending)[-MAX_BLOCKS:]
            self._pending.clear()
        elif self._cusum >= ALARM and median(self._pending[-2:]) - reference > MIN_RISE * abs(reference):
            return self._raise(block, reference)
        elif len(self._pending) > MAX_BLOCKS:
            self.rebase()
        return False

    def _distance(self, block: float, reference: float) -> float:
        """Score of a block above the reference, on the logarithmic scale while all values are positive."""
        widened = 1.0 + SPREAD_ERROR / math.sqrt(len(self._blocks))
        if min(block, reference, *self._blocks) > 0.0:
            unit = max(_spread([math.log(value) for value in self._blocks]), MIN_SPREAD)
            return (math.log(block) - math.log(reference)) / (widened * unit)
        unit = max(_spread(self._blocks), MIN_SPREAD * abs(reference), 1e-30)
        return (block - reference) / (widened * unit)

    def _watch(self, block: float) -> bool:
        self._pending = [*self._pending, block][-MAX_BLOCKS:]
        reference = self.reference or 0.0
        unit = _spread(self._blocks)
        if block > self._top + unit:
            self._top, self._since_top = block, 0
        else:
            self._since_top += 1
        back = median(self._pending[-2:]) - reference <= max(2.0 * unit, 0.25 * (self._top - reference))
        if back or self._since_top >= SETTLED_BLOCKS:
            self.rebase()
        return False

    def rebase(self) -> None:
        """Make the present level the reference."""
        self._blocks = (self._pending or self._blocks)[-MIN_BLOCKS:]
        self._pending.clear()
        self._cusum = 0.0
        self.raised, self.reference = False, None
