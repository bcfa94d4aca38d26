"""Outlier test by the tail of the usual values, at a given false discovery rate."""

from typing import Final

import numpy as np
import numpy.typing as npt

MIN_USUAL: Final = 24
"""Usual values for a tail; engineering choice."""

TAIL_SHARE: Final = 0.1
"""Share of the usual values in the tail, common for peaks over a threshold (Coles 2001)."""

MIN_TAIL: Final = 5
"""Values in the tail; engineering choice."""

MIN_SCALE: Final = 0.05
"""Smallest mean excess as a share of the threshold, for values that are all alike; engineering choice."""

TINY: Final = 1e-12
"""Smallest mean excess; engineering choice."""

Array = npt.NDArray[np.float64]


def tail_probabilities(values: Array, usual: Array) -> Array:
    """Probability that a usual value is at least as large as each of these; 0 for non-finite ones.

    Below the highest tenth of the usual values it is the rank, `(1 + above) / (count + 1)`. Beyond, the excess over
    that threshold is exponential (peaks over a threshold; Coles, An Introduction to Statistical Modeling of Extreme
    Values, 2001, ch. 4, with shape 0). With the uncertainty of its mean b, the chance of an excess y after k of them is
    `(1 + y / (k b))^-k`. The loss of a calibrated classifier has such a tail, or a lighter one.

    Args:
        values: The values to test.
        usual: At least `MIN_USUAL`; non-finite ones are ignored.
    """
    usual = np.sort(usual[np.isfinite(usual)])
    count = max(MIN_TAIL, int(TAIL_SHARE * usual.size))
    threshold = usual[-count - 1]
    scale = max(float((usual[-count:] - threshold).mean()), MIN_SCALE * abs(float(threshold)), TINY)
    finite = np.where(np.isfinite(values), values, np.inf)
    above = usual.size - np.searchsorted(usual, finite, side="left")
    by_rank = (1 + above) / (usual.size + 1)
    excess = np.maximum(finite - threshold, 0.0)
    by_tail = count / usual.size * (1 + excess / (count * scale)) ** -float(count)
    return np.where(finite > threshold, by_tail, by_rank)


def discoveries(probabilities: Array, rate: float) -> npt.NDArray[np.bool_]:
    """Which probabilities are significant at the false discovery rate `rate`.

    Benjamini and Hochberg, Controlling the False Discovery Rate (1995).
    """
    count = probabilities.size
    ranked = np.sort(probabilities)
    passed = np.flatnonzero(ranked <= rate * np.arange(1, count + 1) / count)
    limit = float(ranked[passed[-1]]) if passed.size else -1.0
    return probabilities <= limit
