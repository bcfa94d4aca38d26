"""The fast detector: is this one loss outside what the recent healthy ones allow?"""

from typing import Any, Final

from lightning_spike.detectors.baseline import Baseline

__all__ = ["FastDetector"]

LEAST_RISE: Final = 0.05
"""A loss has to be this share above the level to matter, however small the noise (the prototype of peers.md 0a: ratio > 1.05)."""
LEAST_OF_START: Final = 1e-3
"""… and this share of the level at which the run began: below, it is the rounding of a finished run."""
START: Final = 32
"""Accepted values whose median is the level at which the run began."""
HYSTERESIS: Final = 0.6
"""Inside an episode a loss is still outside while its score is above this share of the limit."""


class FastDetector:
    """A `Baseline` of accepted losses with a verdict for the next one. One-sided: a loss that falls is no trouble."""

    def __init__(self) -> None:
        """Start empty."""
        self.baseline = Baseline()
        self._start = 0.0
        self._seen = 0

    def outside(self, value: float, score: float, *, inside_episode: bool) -> bool:
        """Whether a finite loss with this score left its range."""
        level = self.baseline.level
        if level is None or not self.baseline.ready:
            return False
        limit = self.baseline.limit * (HYSTERESIS if inside_episode else 1.0)
        return score > limit and value - level > max(LEAST_RISE * abs(level), LEAST_OF_START * self._start)

    def accept(self, value: float, noise: float) -> None:
        """Take a loss as healthy."""
        self.baseline.push(value, noise)
        if self._seen < START:
            self._seen += 1
            self._start = abs(self.baseline.level or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"baseline": self.baseline.state_dict(), "start": self._start, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self.baseline.load_state_dict(state["baseline"])
        self._start = state["start"]
        self._seen = state["seen"]
