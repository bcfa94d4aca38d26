"""Whether the same few batches come again and again, by the statistics of their values.

A net that is trained on them knows them by heart.
"""

import dataclasses
from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import number
from lightning_spike.rolling import median

WINDOW: Final = 64
"""Batches before the onset that are compared with each other."""
FEWEST: Final = 32
"""… without which nothing is said."""
FRESH: Final = 0.6
"""Share of them that may be unlike all others for the same batches to come again and again: augmentation, or whatever
else is changed now and then, spares the rest. Batches drawn anew are nearly all unlike each other, and an epoch of more
than `WINDOW` batches shows none twice."""
OFTEN: Final = 4
"""Times that a batch must have come to be known by heart."""
AHEAD: Final = 96
"""Batches from the onset on whose losses are compared with those of the same batches before."""
LEAST: Final = 3
"""Batches of a kind without which their losses are not compared."""
DIGITS: Final = 5
"""Digits to which statistics of the same values agree, in whatever order a device adds them up."""
TELLING: Final = frozenset({"mean", "std", "entropy"})
"""Statistics of which one must be there: the rest may be the same for all batches."""
STATISTICS: Final = frozenset({"mean", "std", "max_abs", "zeros", "entropy", "largest", "distinct"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The same few batches again and again, up to the onset."""

    kinds: int
    """Different batches among those that came `OFTEN` and more."""
    came: int
    """How many of the last `window` batches were one of them."""
    window: int
    known: float | None
    """Median loss, from the onset on, of batches that had come before, over the loss before the episode; `None` of too
    few."""
    altered: float | None
    """The same of batches that had not come before."""


def repeats(view: EpisodeView) -> Repeats | None:
    """How often the batches before the onset had come before; `None` where they were new, where few are held, and where their values were not recorded."""
    ordinals = view.store.history.ordinals
    prints = _prints(view)
    before = prints[(ordinals >= view.onset - WINDOW) & (ordinals < view.onset)]
    if prints.shape[1] == 0 or len(before) < FEWEST:
        return None
    counts = Counter(row.tobytes() for row in before)
    often = {key: count for key, count in counts.items() if count >= OFTEN}
    came = sum(often.values())
    if len(before) - came > FRESH * len(before):
        return None
    after = (ordinals >= view.onset) & (ordinals < view.onset + AHEAD)
    old = np.array([row.tobytes() in often for row in prints[after]], dtype=bool)
    losses = view.store.history.series(view.episode.signal)[after]
    return Repeats(
        kinds=len(often),
        came=came,
        window=len(before),
        known=_level(view, losses[old]),
        altered=_level(view, losses[~old]),
    )


def _prints(view: EpisodeView) -> npt.NDArray[np.float64]:
    """A row for every batch that tells it from others.

    Statistics of its values, to some digits; a few columns, none where nothing was recorded.
    """
    history = view.store.history
    names = [s for s in history.signals if s.startswith("batch/") and s.rsplit("/", 1)[-1] in STATISTICS]
    if not any(name.rsplit("/", 1)[-1] in TELLING for name in names):
        return np.zeros((history.ordinals.size, 0))
    values = np.stack([history.series(name) for name in names], axis=1)
    parts, exponents = np.frexp(values)
    return np.concatenate([np.round(parts, DIGITS) + 0.0, exponents.astype(np.float64)], axis=1)


def _level(view: EpisodeView, losses: npt.NDArray[np.float64]) -> float | None:
    before = number(view.episode.loss_before)
    known = losses[np.isfinite(losses)]
    if before is None or not before > 0.0 or known.size < LEAST:
        return None
    return median(known.tolist()) / before
