"""What an examination may still cost, and which questions were left out for it."""

import math
from typing import Final

__all__ = ["COPIES", "Allowance", "steps_worth"]

UPDATE: Final = 0.85
"""Training steps' worth of the processor's time of an update that is made again: no batch is loaded, and nobody watches (`python benchmarks/lab.py`, the columns cost and way) …"""
PASS: Final = 1 / 3
"""… of a forward pass: a backward pass takes twice as long …"""
GRADIENTS: Final = 0.5
"""… of one from which gradients are taken, that of a single sample included: on a small network it costs half as much as that of a batch …"""
COPIES: Final = 1.0
"""… and of the copies of the state that an examination begins and ends with."""


def steps_worth(*, updates: int = 0, passes: int = 0, gradients: int = 0) -> float:
    """What so many of them cost, in training steps; pure."""
    return UPDATE * updates + PASS * passes + GRADIENTS * gradients


class Allowance:
    """Training steps' worth that an examination may cost. Counted, not timed: so it ends at the same question every time, and on all ranks.

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
