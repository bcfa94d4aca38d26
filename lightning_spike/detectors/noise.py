"""Noise of a series around a smooth course, from its second differences."""

import math
from collections.abc import Sequence

from lightning_spike.rolling import MAD_TO_SIGMA, median


def bends(values: Sequence[float]) -> list[float]:
    """Second differences, which leave out level and slope."""
    return [a - 2.0 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]


def bend_noise(values: Sequence[float]) -> float:
    """Robust standard deviation around a smooth course; infinite for fewer than three values."""
    sizes = [abs(bend) for bend in bends(values)]
    return median(sizes) * MAD_TO_SIGMA / math.sqrt(6.0) if sizes else math.inf
