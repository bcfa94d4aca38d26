"""Fast detector: judges a single loss against the recent healthy ones."""

import math
from collections import deque
from typing import Final

from lightning_spike.detectors.baseline import RUN_CLIP, RUN_LENGTH, Baseline
from lightning_spike.detectors.resumable import Resumable

MIN_RISE: Final = 0.05
"""Smallest rise above the level that counts, as a share of the level; engineering choice."""
MIN_PAIR_RISE: Final = 0.10
"""Smallest rise of two losses in a row; below, the level may have moved, as after a warm restart;
engineering choice."""
MIN_RISE_OF_START: Final = 1e-3
"""Smallest rise as a share of the first level; below, it is the rounding of a finished run; engineering choice."""
COLD_START_FACTOR: Final = 10.0
"""Times the largest loss so far that is out of range before there is a baseline; Megatron-LM's factor (science.md
1.1)."""
COLD_START_EARLY: Final = 100.0
"""Added to that factor over the number of losses so far; engineering choice."""
MIN_LOSSES: Final = 4
"""Losses before any is out of range; engineering choice."""
START_LOSSES: Final = 32
"""Accepted losses whose median is the first level; engineering choice."""
MAX_SAMPLE_LOSS: Final = 6.0
"""Times the first level that one hard sample of a healthy run can reach: a confident error among ten classes, some nine
nats; engineering choice."""
MAX_LIFT: Final = 2.0
"""Largest score by which a level that has just risen excuses a loss, as after a warm restart; engineering choice."""
MAX_LIFTED_RISE: Final = 0.33
"""Largest rise above the level, as a share of it, that is excused so; engineering choice."""
MIN_RUN_SCORE: Final = 2.0
"""Smallest score of a loss that completes a run of raised ones; engineering choice."""
MIN_RUN_RISE: Final = 0.10
"""Smallest rise of the last losses together, as a share of the level, for such a run; engineering choice."""
HYSTERESIS: Final = 0.6
"""Share of the limit above which a loss inside an episode is still out of range; engineering choice."""


class FastDetector(Resumable):
    """A `Baseline` of accepted losses that judges the next one; a falling loss is never out of range."""

    STATE = ("baseline", "_start", "_seen", "_lowest", "_highest", "_before", "_run")

    def __init__(self) -> None:
        """Start empty."""
        self.baseline = Baseline()
        self._start = 0.0
        self._seen = 0
        self._lowest = math.inf
        self._highest = 0.0
        self._before = 0.0
        """Score of the last accepted loss."""
        self._run: deque[float] = deque(maxlen=RUN_LENGTH - 1)
        """Clipped scores of the last accepted losses."""

    def outside(self, value: float, score: float, samples: int | None = None, *, inside_episode: bool) -> int:
        """Number of last losses, this one included, that show it is out of range; 0 if it is not.

        Args:
            value: The loss, finite, a mean over the batch.
            score: Its score by the baseline.
            samples: Samples in the batch, where known. A rise that one hard sample can cause alone must exceed the
                tail seen so far.
            inside_episode: The batches before were out of range.
        """
        baseline = self.baseline
        level = baseline.level
        if level is None or not baseline.ready:
            too_high = value > self._highest * (COLD_START_FACTOR + COLD_START_EARLY / max(1, self._seen))
            return int(self._seen >= MIN_LOSSES and self._lowest >= 0.0 and too_high)
        if score <= MIN_RUN_SCORE and not inside_episode:
            return 0
        rise = value - level
        if rise <= MIN_RISE_OF_START * self._start:
            return 0
        one_can = samples is not None and rise * samples < MAX_SAMPLE_LOSS * self._start
        limit = baseline.limit if one_can else baseline.sure_limit
        if inside_episode:
            return int(score > HYSTERESIS * limit and rise > MIN_RISE * abs(level))
        return self._alone_outside(rise, abs(level), score, limit) or self._run_outside(level, score)

    def _alone_outside(self, rise: float, size: float, score: float, limit: float) -> int:
        """The same by this loss, or this one and the one before."""
        pair_limit = self.baseline.pair_limit
        if score <= limit and self._before <= pair_limit:
            return 0
        lift = min(self.baseline.lift, MAX_LIFT) if rise < MAX_LIFTED_RISE * size else 0.0
        alone = score - lift > limit and rise > MIN_RISE * size
        return int(alone or (min(score, self._before) - lift > pair_limit and rise > MIN_PAIR_RISE * size))

    def _run_outside(self, level: float, score: float) -> int:
        """The same by the sum of the last losses, each of which may be in range."""
        total = sum(self._run) + min(score, RUN_CLIP)
        if total <= self.baseline.run_limit or self.baseline.recent_level - level <= MIN_RUN_RISE * abs(level):
            return 0
        return RUN_LENGTH

    def accept(self, value: float, noise: float, score: float) -> None:
        """Accept a loss with this score as healthy."""
        self.baseline.push(value, noise)
        self._before = score
        self._run.append(score if -RUN_CLIP < score < RUN_CLIP else math.copysign(RUN_CLIP, score))
        if self._seen < START_LOSSES:
            self._lowest, self._highest = min(self._lowest, value), max(self._highest, value)
            self._seen += 1
            self._start = abs(self.baseline.level or 0.0)
