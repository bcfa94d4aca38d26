"""Whether a loss has stopped falling.

No detector of episodes, but a question that is asked of a run in which nothing else has happened.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.rolling import median, median_error

PARTS: Final = 8
"""Parts of a run so far whose levels are compared."""
LEAST_PART: Final = 16
"""Losses that a level needs."""
CLEARLY: Final = 2.0
"""Standard errors by which the loss must have come down to be falling."""


def stagnates(losses: npt.NDArray[np.float64]) -> bool:
    """Whether the loss has stopped falling.

    Its newest level is not below the lowest of the first half of the run; false for a run too young to tell. Pure.

    Args:
        losses: All so far, oldest first, shape `(n,)`; what is not finite is left out.
    """
    finite = losses[np.isfinite(losses)]
    if finite.size < PARTS * LEAST_PART:
        return False
    parts = [part.tolist() for part in np.array_split(finite, PARTS)]
    lowest = min(parts[: PARTS // 2], key=median)
    error = max(median_error(lowest), median_error(parts[-1]))
    return median(parts[-1]) > median(lowest) - CLEARLY * error
