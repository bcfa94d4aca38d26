"""How much of a run's time examinations may take, and which episodes it goes to."""

from typing import Final, Literal

__all__ = ["FULL_STEPS", "LEAST_STEPS", "TRIAGE_STEPS", "Budget", "Extent"]

Extent = Literal["full", "triage"]

FULL_STEPS: Final = 40
"""Training steps' worth of time that a full examination may take, the way from the snapshot included: what no longer fits is not asked, and named. Most take less (`python benchmarks/lab.py`, the columns cost and way)."""
LEAST_STEPS: Final = 15
"""… and what the questions that are always asked take beside the way, however long that is."""
TRIAGE_STEPS: Final = 3
"""… and a triage."""
OVERDRAFT: Final = 2.0
"""By what factor the worst episode so far may exceed what is there for it."""


class Budget:
    """Seconds for examinations, which grow with the run.

    The first episode always gets a full examination. One that is worse than all that were examined may overdraw, so that the most severe ones are examined whenever
    they come; for any other that does not fit there is a triage, if that fits.

    Args:
        share: Of the seconds of training so far.
        free: Seconds on top of it: nobody minds a few, and a short run has no share to spend.
    """

    def __init__(self, *, share: float, free: float) -> None:
        self._share = share
        self._free = free
        self.spent = 0.0
        """Seconds so far."""
        self.examined = 0
        """Episodes examined in full."""
        self._worst = -1.0

    def extent(self, *, severity: float, elapsed: float, full: float, triage: float) -> Extent | None:
        """How far an episode may be examined; `None` for not at all.

        Args:
            severity: Of the episode.
            elapsed: Seconds of training so far.
            full: Seconds that a full examination is expected to take.
            triage: … and a triage.
        """
        there = self._free + self._share * elapsed
        left = OVERDRAFT * there - self.spent if severity > self._worst else there - self.spent
        if not self.examined or full <= left:
            return "full"
        return "triage" if triage <= there - self.spent else None

    def bears(self, seconds: float, *, elapsed: float) -> bool:
        """Whether something that takes so long still fits, without an overdraft."""
        return self.spent + seconds <= self._free + self._share * elapsed

    def took(self, seconds: float, *, extent: Extent, severity: float) -> None:
        """Book an examination."""
        self.spent += seconds
        if extent == "full":
            self.examined += 1
            self._worst = max(self._worst, severity)
