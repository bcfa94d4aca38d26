"""Test whether a loss has stopped falling, for runs without an episode."""

from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.rolling import median, median_error

PARTS: Final = 8
"""Parts of the run whose levels are compared; engineering choice."""
MIN_LOSSES: Final = 16
"""Losses in a part; engineering choice."""
FALL_ERRORS: Final = 2.0
"""Standard errors by which a falling loss must have come down; engineering choice."""


def stagnates(losses: npt.NDArray[np.float64]) -> bool:
    """Whether the newest level is not below the lowest of the first half of the run; false for a short run.

    Args:
        losses: All so far, oldest first, shape `(n,)`; non-finite ones are ignored.
    """
    finite = losses[np.isfinite(losses)]
    if finite.size < PARTS * MIN_LOSSES:
        return False
    parts = [part.tolist() for part in np.array_split(finite, PARTS)]
    lowest = min(parts[: PARTS // 2], key=median)
    error = max(median_error(lowest), median_error(parts[-1]))
    return median(parts[-1]) > median(lowest) - FALL_ERRORS * error
