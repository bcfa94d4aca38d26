"""The fast detector: is this one loss outside what the recent healthy ones allow?"""

import math
from collections import deque
from typing import Any, Final

from lightning_spike.detectors.baseline import RUN, RUN_CLIP, Baseline

LEAST_RISE: Final = 0.05
"""A loss has to be this share above the level to matter, however small the noise (the prototype of peers.md 0a: ratio >
1.05)."""
LEAST_PAIR_RISE: Final = 0.10
"""The same for two in a row: below, it may be the level that moved a little, as after a warm restart."""
LEAST_OF_START: Final = 1e-3
"""… and this share of the level at which the run began: below, it is the rounding of a finished run."""
WILD: Final = 10.0
"""Times the largest loss so far from which on one is outside before there is a baseline (Megatron-LM's factor) …"""
WILD_FEW: Final = 100.0
"""… plus this over the number of losses so far."""
LEAST_SEEN: Final = 4
"""Losses so far without which none is outside."""
START: Final = 32
"""Accepted values whose median is the level at which the run began."""
ONE_SAMPLE: Final = 6.0
"""Times the loss at which the run began that one hard sample of a healthy run can have: some nine nats of ten classes,
confidently wrong."""
MOST_LIFT: Final = 2.0
"""Standard deviations up to which a level that has just risen excuses a loss: a warm restart lifts all of them a little
…"""
MODEST: Final = 0.33
"""… if the loss is less than this share above the level: what stands higher is no matter of a little."""
LEAST_RUN: Final = 2.0
"""Score that a loss must have to complete a run of raised ones."""
LEAST_RUN_RISE: Final = 0.10
"""Share of the level by which the last losses as a whole must have risen for that."""
HYSTERESIS: Final = 0.6
"""Inside an episode a loss is still outside while its score is above this share of the limit."""


class FastDetector:
    """A `Baseline` of accepted losses with a verdict for the next one. One-sided: a loss that falls is no trouble."""

    def __init__(self) -> None:
        """Start empty."""
        self.baseline = Baseline()
        self._start = 0.0
        self._seen = 0
        self._least = math.inf
        self._most = 0.0
        self._before = 0.0
        """Score of the last accepted loss."""
        self._run: deque[float] = deque(maxlen=RUN - 1)
        """Clipped scores of the last accepted losses."""

    def outside(self, value: float, score: float, samples: int | None = None, *, inside_episode: bool) -> int:
        """How many of the last losses, this one included, show that it left its range; 0 if it did not.

        Args:
            value: The loss, finite, a mean over the batch.
            score: Its score by the baseline.
            samples: In the batch, where known: a rise that one hard sample can make alone is judged by the tail that
                was seen.
            inside_episode: The batches before were outside.
        """
        baseline = self.baseline
        level = baseline.level
        if level is None or not baseline.ready:
            wild = value > self._most * (WILD + WILD_FEW / max(1, self._seen))
            return int(self._seen >= LEAST_SEEN and self._least >= 0.0 and wild)
        if score <= LEAST_RUN and not inside_episode:
            return 0
        rise = value - level
        if rise <= LEAST_OF_START * self._start:
            return 0
        one_can = samples is not None and rise * samples < ONE_SAMPLE * self._start
        limit = baseline.limit if one_can else baseline.sure_limit
        if inside_episode:
            return int(score > HYSTERESIS * limit and rise > LEAST_RISE * abs(level))
        return self._alone_outside(rise, abs(level), score, limit) or self._run_outside(level, score)

    def _alone_outside(self, rise: float, size: float, score: float, limit: float) -> int:
        """The same by this loss, or by it and the one before."""
        pair_limit = self.baseline.pair_limit
        if score <= limit and self._before <= pair_limit:
            return 0
        lift = min(self.baseline.lift, MOST_LIFT) if rise < MODEST * size else 0.0
        alone = score - lift > limit and rise > LEAST_RISE * size
        return int(alone or (min(score, self._before) - lift > pair_limit and rise > LEAST_PAIR_RISE * size))

    def _run_outside(self, level: float, score: float) -> int:
        """The same for losses that come and go: each may be in its range, not all of them."""
        total = sum(self._run) + min(score, RUN_CLIP)
        if total <= self.baseline.run_limit or self.baseline.lately - level <= LEAST_RUN_RISE * abs(level):
            return 0
        return RUN

    def accept(self, value: float, noise: float, score: float) -> None:
        """Take a loss with this score as healthy."""
        self.baseline.push(value, noise)
        self._before = score
        self._run.append(score if -RUN_CLIP < score < RUN_CLIP else math.copysign(RUN_CLIP, score))
        if self._seen < START:
            self._least, self._most = min(self._least, value), max(self._most, value)
            self._seen += 1
            self._start = abs(self.baseline.level or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "baseline": self.baseline.state_dict(),
            "start": self._start,
            "seen": self._seen,
            "least": self._least if self._seen else 0.0,
            "most": self._most,
            "before": self._before,
            "run": list(self._run),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self.baseline.load_state_dict(state["baseline"])
        self._start = state["start"]
        self._seen = state["seen"]
        self._least = state["least"] if self._seen else math.inf
        self._most = state["most"]
        self._before = state["before"]
        self._run.clear()
        self._run.extend(state["run"])
