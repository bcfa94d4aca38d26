"""The fast detector: is this one loss outside what the recent healthy ones allow?"""

import math
from typing import Any, Final

from lightning_spike.detectors.baseline import Baseline

__all__ = ["FastDetector"]

LEAST_RISE: Final = 0.05
"""A loss has to be this share above the level to matter, however small the noise (the prototype of peers.md 0a: ratio > 1.05)."""
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
ONE_SAMPLE: Final = 4.0
"""Times the loss at which the run began that one hard sample of a healthy run can have: some nine nats of ten classes, confidently wrong."""
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

    def outside(self, value: float, score: float, samples: int | None = None, *, inside_episode: bool) -> bool:
        """Whether a finite loss with this score left its range.

        Args:
            value: The loss, a mean over the batch.
            score: Its score by the baseline.
            samples: In the batch, where known: a rise that one hard sample can make alone is judged by the tail that was seen.
            inside_episode: The batches before were outside.
        """
        level = self.baseline.level
        if level is None or not self.baseline.ready:
            return (
                self._seen >= LEAST_SEEN and self._least >= 0.0 and value > self._most * (WILD + WILD_FEW / self._seen)
            )
        one_can = samples is not None and (value - level) * samples < ONE_SAMPLE * self._start
        limit = self.baseline.limit if one_can else self.baseline.sure_limit
        limit *= HYSTERESIS if inside_episode else 1.0
        share = LEAST_RISE
        if score <= limit:
            if min(score, self._before) <= self.baseline.pair_limit:
                return False
            share = LEAST_PAIR_RISE
        return value - level > max(share * abs(level), LEAST_OF_START * self._start)

    def accept(self, value: float, noise: float, score: float) -> None:
        """Take a loss with this score as healthy."""
        self.baseline.push(value, noise)
        self._before = score
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self.baseline.load_state_dict(state["baseline"])
        self._start = state["start"]
        self._seen = state["seen"]
        self._least = state["least"] if self._seen else math.inf
        self._most = state["most"]
        self._before = state["before"]
