"""Where a run without an episode shows that something is wrong all the same.

A rise of the loss that is too small or too slow to be one, at a place where there is reason to look.
"""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.records import Moment
from lightning_spike.rolling import median, median_error
from lightning_spike.store import TrainerStateStore

BEFORE: Final = 64
"""Losses that make the level before."""
BLOCKS: Final = (24, 48)
"""Losses that make a level after: as many as an episode takes to be over, and twice as many where the loss is noisy."""
HORIZON: Final = 192
"""Batches within which the loss must have risen: a rate that climbs takes some dozens to do harm."""
LEAST: Final = 0.05
"""Log-ratio of the levels from which the rise is worth a word."""
SURE: Final = 5.0
"""Standard errors that it must have: the highest of some two dozen levels is looked at, and a loss wanders somewhat in
a healthy run too."""
BACK: Final = 0.25
"""Share of the rise that may be left for the loss to be back."""
NOWHERE: Final = Moment(ordinal=0, step=0, epoch=0, batch_idx=0)
"""Stands for a row that the history has let go meanwhile; it never does while it is read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """The level of the loss before a moment, and the highest one after it."""

    before: float
    peak: float
    begun: Moment
    """The first batch of the first block that lies clearly above."""
    peak_at: Moment
    end: Moment | None
    """Where it is back; `None` where it is not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """That a cause has shown itself without an episode."""

    at: Moment
    rise: Rise | None = None
    """Of the loss, as far as there is one."""


def rise_after(store: TrainerStateStore, ordinal: int, signal: str = "loss") -> Rise | None:
    """Whether the level of the loss went up after a batch; pure.

    Medians of 24 losses, then of 48, are held against that of the 64 up to the batch, on the logarithmic scale, with
    the standard errors that their scatter gives. Only to be asked
    where something else says that trouble may have begun there: over a whole run a wandering loss would pass the test
    by chance.

    Returns:
        `None` where it did not rise, or there are too few losses or one that is not positive.
    """
    return next((rise for size in BLOCKS if (rise := _rise(store, ordinal, signal, size)) is not None), None)


def _rise(store: TrainerStateStore, ordinal: int, signal: str, size: int) -> Rise | None:
    history = store.history
    losses, ordinals = history.series(signal), history.ordinals
    fine = np.isfinite(losses)
    early = losses[fine & (ordinals <= ordinal)][-BEFORE:]
    later = np.flatnonzero(fine & (ordinals > ordinal) & (ordinals <= ordinal + HORIZON))
    if early.size < BEFORE // 2 or later.size < size or not min(early.min(), losses[later].min()) > 0.0:
        return None
    blocks = [later[k : k + size] for k in range(0, later.size - size + 1, size // 2)]
    start, start_error = _level(early)
    levels = [_level(losses[block]) for block in blocks]
    above = [level - start > max(LEAST, SURE * math.hypot(error, start_error)) for level, error in levels]
    if not any(above):
        return None
    top = max(range(len(levels)), key=lambda k: levels[k][0])
    back = next(
        (k for k in range(top + 1, len(levels)) if levels[k][0] - start <= BACK * (levels[top][0] - start)), None
    )
    moments = [history.moment(int(ordinals[block[0]])) or NOWHERE for block in blocks]
    return Rise(
        before=math.exp(start),
        peak=math.exp(levels[top][0]),
        begun=moments[above.index(True)],
        peak_at=moments[top],
        end=None if back is None else moments[back],
    )


def _level(losses: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Median of the logarithms, and its standard error for normal noise."""
    logs = np.log(losses).tolist()
    return median(logs), median_error(logs)
