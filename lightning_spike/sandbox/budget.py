"""Limits on the cost of examinations, in time of the run and in training steps."""

import math
from typing import Final, Literal

Extent = Literal["full", "triage"]

FULL_STEPS: Final = 40
"""Training steps' worth of time of a full examination, its replay included; questions beyond are named and left out.
Most take less (`python benchmarks/lab.py`, the columns cost and way)."""
MIN_STEPS: Final = 15
"""Training steps' worth of the questions that are always asked, besides the replay (`python benchmarks/lab.py`)."""
TRIAGE_STEPS: Final = 3
"""Training steps' worth of a triage (`python benchmarks/lab.py`)."""
MAX_OVERDRAFT: Final = 2.0
"""Factor by which the worst episode so far can exceed the budget; engineering choice."""


class Budget:
    """Seconds for examinations, which grow with the run.

    The first episode gets a full examination. One that is worse than all examined ones can overdraw the budget. Others
    get a triage where a full examination does not fit.

    Args:
        share: Share of the seconds of training so far.
        free: Seconds on top, for short runs.
    """

    def __init__(self, *, share: float, free: float) -> None:
        self._share = share
        self._free = free
        self.spent = 0.0
        """Seconds spent so far."""
        self.examined = 0
        """Number of episodes with a full examination."""
        self._worst = -1.0

    def extent(self, *, severity: float, elapsed: float, full: float, triage: float) -> Extent | None:
        """The examination that fits the budget; `None` for none.

        Args:
            severity: Of the episode.
            elapsed: Seconds of training so far.
            full: Expected seconds of a full examination.
            triage: Expected seconds of a triage.
        """
        total = self._free + self._share * elapsed
        left = (MAX_OVERDRAFT if severity > self._worst else 1.0) * total - self.spent
        if not self.examined or full <= left:
            return "full"
        return "triage" if self.has_room(triage, elapsed=elapsed) else None

    def has_room(self, seconds: float, *, elapsed: float) -> bool:
        """Whether this many seconds still fit, without an overdraft."""
        return self.spent + seconds <= self._free + self._share * elapsed

    def book(self, seconds: float, *, extent: Extent, severity: float) -> None:
        """Subtract the seconds of an examination."""
        self.spent += seconds
        if extent == "full":
            self.examined += 1
            self._worst = max(self._worst, severity)


UPDATE_COST: Final = 0.85
"""Training steps' worth of time of a replayed update, without data loading (`python benchmarks/lab.py`)."""
PASS_COST: Final = 1 / 3
"""… of a forward pass; a backward pass takes twice as long."""
GRADIENT_COST: Final = 0.5
"""… of a pass from which gradients are taken, also of a single sample."""
COPY_COST: Final = 1.0
"""… of the copies of the state at both ends of an examination."""


def step_cost(*, updates: int = 0, passes: int = 0, gradients: int = 0) -> float:
    """Cost in training steps."""
    return UPDATE_COST * updates + PASS_COST * passes + GRADIENT_COST * gradients


class Allowance:
    """Cost limit of an examination in training steps, counted and not timed, so that it is the same on all ranks.

    Args:
        steps: The limit; infinite for none.
    """

    def __init__(self, steps: float = math.inf) -> None:
        self.steps = steps
        self.left_out: list[str] = []
        """Questions beyond the limit, in order, each once."""

    def leave_out(self, question: str) -> None:
        """Note a question beyond the limit."""
        if question not in self.left_out:
            self.left_out.append(question)
