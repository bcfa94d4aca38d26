"""How many ordinary batches tell how much worse they have become."""

import math
from collections.abc import Sequence
from typing import Final, TypeVar

from lightning_spike.lab.replay.evaluate import Numbers

T = TypeVar("T")

EXACT: Final = 0.1
"""Standard error of the mean rise, as a share of it, from which more batches would tell no more: shares of a damage are
told in tenths. An engineering choice."""
FEWEST: Final = 2
"""With one there is no telling how far to trust it."""
MOST: Final = 4
"""It is a difference of pairs, the same batch before and after, so few will do; four gave the right group for 111 of
111 faults at batch 32 (`python benchmarks/lab.py`)."""


def control_sample_size(controls: Sequence[T], rises: Numbers) -> Sequence[T]:
    """As many of the control batches, from the front, as are needed to know their mean rise; two to four.

    Args:
        controls: What is chosen from.
        rises: How much the loss of each has risen over what is in question, on the scale of `log_scale`; shape
            `(controls,)`.
    """
    if len(controls) <= FEWEST:
        return controls
    mean, scatter = float(rises.mean()), float(rises.std(ddof=1))
    wanted = (scatter / (EXACT * mean)) ** 2 if mean > 0 and math.isfinite(mean) else MOST
    return controls[: min(max(math.ceil(wanted), FEWEST), MOST)]
