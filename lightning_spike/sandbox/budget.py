"""How much of a run's time examinations may take, and which episodes it goes to."""

import math
from typing import Final, Literal

Extent = Literal["full", "triage"]

FULL_STEPS: Final = 40
"""Training steps' worth of time that a full examination may take, the way from the snapshot included: what no longer
fits is not asked, and named. Most take less (`python benchmarks/lab.py`, the columns cost and way)."""
LEAST_STEPS: Final = 15
"""… and what the questions that are always asked take beside the way, however long that is."""
TRIAGE_STEPS: Final = 3
"""… and a triage."""
OVERDRAFT: Final = 2.0
"""By what factor the worst episode so far may exceed what is there for it."""


class Budget:
    """Seconds for examinations, which grow with the run.

    The first episode always gets a full examination. One that is worse than all that were examined may overdraw, so
    that the most severe ones are examined whenever they come; for any other that does not fit there is a triage, if
    that fits.

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


UPDATE: Final = 0.85
"""Training steps' worth of the processor's time of an update that is made again: no batch is loaded, and nobody watches
(`python benchmarks/lab.py`, the columns cost and way) …"""
PASS: Final = 1 / 3
"""… of a forward pass: a backward pass takes twice as long …"""
GRADIENTS: Final = 0.5
"""… of one from which gradients are taken, that of a single sample included: on a small network it costs half as much
as that of a batch …"""
COPIES: Final = 1.0
"""… and of the copies of the state that an examination begins and ends with."""


def steps_worth(*, updates: int = 0, passes: int = 0, gradients: int = 0) -> float:
    """What so many of them cost, in training steps; pure."""
    return UPDATE * updates + PASS * passes + GRADIENTS * gradients


class Allowance:
    """Training steps' worth that an examination may cost.

    Counted, not timed: so it ends at the same question every time, and on all ranks.

    Args:
        steps: In all; infinite where nobody minds.
    """

    def __init__(self, steps: float = math.inf) -> None:
        self.steps = steps
        self.left_out: list[str] = []
        """What was not asked for want of it, in the order of worth, each once."""

    def leave_out(self, question: str) -> None:
        """Note what is not asked."""
        if question not in self.left_out:
            self.left_out.append(question)

    @property
    def text(self) -> str:
        """What was not asked, for a person; empty where all was."""
        if not self.left_out:
            return ""
        return f"Not tried, since an examination may cost no more than {self.steps:g} training steps: {', '.join(self.left_out)}."
