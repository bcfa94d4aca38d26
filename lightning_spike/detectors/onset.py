"""Where a change in a short series began, found afterwards."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]


def ramp_onset(values: Sequence[float]) -> int:
    """Index of the last level value before a rise: the best fit of a step or of a ramp over all places.

    Least squares in closed form for every place at once, of `a + b * (t > k)` and of `a + b * max(0, t - k)`, on values
    cut at their 2nd and 98th percentile so that one outlier does not bend the fit. Offline change-point fitting as in
    science.md 1.8, with a ramp beside the step.

    Args:
        values: At least one finite value, oldest first, the rise at the end. Quadratic in their number: for some
            hundreds.

    Returns:
        In [0, len(values) - 1].
    """
    count = len(values)
    if count < 4:  # noqa: PLR2004 - a level and a slope need four points
        return 0
    series = np.asarray(values, dtype=np.float64)
    series = np.clip(series, *np.quantile(series, (0.02, 0.98)))
    deviation = series - series.mean()
    steps = np.arange(count)
    since = (steps[None, :] - steps[:-1, None]).astype(np.float64)
    best = [_explained(shape, deviation) for shape in (np.clip(since, 0.0, 1.0), np.maximum(0.0, since))]
    return int(np.argmax(best[0] if best[0].max() > best[1].max() else best[1]))


def _explained(shapes: FloatArray, deviation: FloatArray) -> FloatArray:
    """Sum of squares that each row of `shapes` explains of the deviation; falls explain nothing."""
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    explained: FloatArray = np.maximum(0.0, shapes @ deviation) ** 2 / (shapes**2).sum(axis=1)
    return explained
