"""A rise of the loss that is too small or too slow to be an episode, looked for where another finding suggests one."""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.records import Moment
from lightning_spike.rolling import median, median_error
from lightning_spike.store import TrainerStateStore

LEVEL_BATCHES_BEFORE: Final = 64
"""Losses whose median is the level before; engineering choice."""
BLOCKS: Final = (24, 48)
"""Losses whose median is a level after: 24 as an episode needs to end, 48 where the loss is noisy;
engineering choice."""
HORIZON: Final = 192
"""Batches within which the loss must have risen: a climbing rate needs some dozens to do harm; engineering choice."""
MIN_LOG_RISE: Final = 0.05
"""Smallest log-ratio of the levels that is reported; engineering choice."""
MIN_RISE_ERRORS: Final = 5.0
"""Standard errors that a rise must have (5 sigma): it is the highest of some two dozen levels."""
MAX_RISE_LEFT: Final = 0.25
"""Share of the rise that may be left for the loss to have recovered; engineering choice."""
NOWHERE: Final = Moment(ordinal=0, step=0, epoch=0, batch_idx=0)
"""Stands for a row that the history no longer holds; this does not happen while it is read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """The level of the loss before a moment, and the highest level after it."""

    before: float
    peak: float
    begun: Moment
    """The first batch of the first block that lies clearly above."""
    peak_at: Moment
    end: Moment | None
    """Where the loss has recovered; `None` where it has not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Where a cause is visible in a run without an episode."""

    at: Moment
    rise: Rise | None = None
    """The rise of the loss, if there is one."""


def rise_after(store: TrainerStateStore, ordinal: int, signal: str = "loss") -> Rise | None:
    """The rise of the loss level after a batch; pure.

    Compares medians of 24, then of 48 log losses with that of the 64 before, with standard errors from their scatter.
    Use it only where another finding suggests trouble at that batch: over a whole run a wandering loss passes by
    chance.

    Returns:
        `None` where the loss did not rise, where there are too few losses, or where one is not positive.
    """
    return next((rise for size in BLOCKS if (rise := _rise(store, ordinal, signal, size)) is not None), None)


def _rise(store: TrainerStateStore, ordinal: int, signal: str, size: int) -> Rise | None:
    history = store.history
    losses, ordinals = history.series(signal), history.ordinals
    fine = np.isfinite(losses)
    early = losses[fine & (ordinals <= ordinal)][-LEVEL_BATCHES_BEFORE:]
    later = np.flatnonzero(fine & (ordinals > ordinal) & (ordinals <= ordinal + HORIZON))
    too_few = early.size < LEVEL_BATCHES_BEFORE // 2 or later.size < size
    if too_few or not min(early.min(), losses[later].min()) > 0.0:
        return None
    blocks = [later[k : k + size] for k in range(0, later.size - size + 1, size // 2)]
    start, start_error = _level(early)
    levels = [_level(losses[block]) for block in blocks]
    above = [
        level - start > max(MIN_LOG_RISE, MIN_RISE_ERRORS * math.hypot(error, start_error)) for level, error in levels
    ]
    if not any(above):
        return None
    top = max(range(len(levels)), key=lambda k: levels[k][0])
    recovered = start + MAX_RISE_LEFT * (levels[top][0] - start)
    back = next((k for k in range(top + 1, len(levels)) if levels[k][0] <= recovered), None)
    moments = [history.moment(int(ordinals[block[0]])) or NOWHERE for block in blocks]
    return Rise(
        before=math.exp(start), peak=math.exp(levels[top][0]), begun=moments[above.index(True)], peak_at=moments[top],
        end=None if back is None else moments[back],
    )  # fmt: skip


def _level(losses: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Median of the log losses, and its standard error for normal noise."""
    logs = np.log(losses).tolist()
    return median(logs), median_error(logs)
