"""Which of a few values are too large for what is usual.

The tail of the usual ones, and a rule that keeps false names rare however many are asked about.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

LEAST_USUAL: Final = 24
"""Usual values from which a tail can be told."""

TAIL: Final = 0.1
"""Share of the usual values that are the tail, as is customary for peaks over a threshold …"""

LEAST_TAIL: Final = 5
"""… and how many they are at least."""

LEAST_SCALE: Final = 0.05
"""Floor of the tail's mean excess, as a share of the threshold: values that are all alike would make any other one an
outlier."""

TINY: Final = 1e-12

Array = npt.NDArray[np.float64]


def tail_probabilities(values: Array, usual: Array) -> Array:
    """How often a usual value is as large as each of these, shape as `values`; 0 for what is not finite.

    Up to the highest tenth of the usual values the rank says so, `(1 + above) / (count + 1)`. Beyond, the excess over
    that threshold is taken to be exponential (peaks over a threshold; Coles, An Introduction to Statistical Modeling of
    Extreme Values, 2001, ch. 4, with shape 0), with the uncertainty of its mean in it: the chance of another excess y
    after k of them with mean b is `(1 + y / (k b))^-k`. The loss of a calibrated classifier has such a tail, or a
    lighter one.

    Args:
        values: In question.
        usual: From `LEAST_USUAL` on; those that are not finite are left out.
    """
    usual = np.sort(usual[np.isfinite(usual)])
    count = max(LEAST_TAIL, int(TAIL * usual.size))
    threshold = usual[-count - 1]
    scale = max(float((usual[-count:] - threshold).mean()), LEAST_SCALE * abs(float(threshold)), TINY)
    finite = np.where(np.isfinite(values), values, np.inf)
    above = usual.size - np.searchsorted(usual, finite, side="left")
    by_rank = (1 + above) / (usual.size + 1)
    excess = np.maximum(finite - threshold, 0.0)
    by_tail = count / usual.size * (1 + excess / (count * scale)) ** -float(count)
    return np.where(finite > threshold, by_tail, by_rank)


def discoveries(probabilities: Array, rate: float) -> npt.NDArray[np.bool_]:
    """Which of them are too small to be chance.

    Of those named, at most the share `rate` is named by chance, on average.

    Benjamini and Hochberg, Controlling the False Discovery Rate (1995). Where there is nothing to find, anything at all
    is named in the share `rate` of cases.
    """
    count = probabilities.size
    ranked = np.sort(probabilities)
    passed = np.flatnonzero(ranked <= rate * np.arange(1, count + 1) / count)
    limit = float(ranked[passed[-1]]) if passed.size else -1.0
    return probabilities <= limit
