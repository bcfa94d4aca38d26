"""Whether the same few batches come again and again, so that the model memorises them."""

import dataclasses
from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import number
from lightning_spike.rolling import median

WINDOW: Final = 64
"""Batches before the onset that are compared with each other; engineering choice."""
MIN_BATCHES: Final = 32
"""Batches before the onset without which nothing is said; engineering choice."""
MAX_NEW_SHARE: Final = 0.6
"""Share of the batches that may be new for the others to count as repeated: augmentation spares some. Batches drawn
anew are nearly all unlike each other; engineering choice."""
MIN_REPEATS: Final = 4
"""Times that a batch must have come to be memorised; engineering choice."""
BATCHES_AFTER: Final = 96
"""Batches from the onset on whose losses are compared with the loss before; engineering choice."""
MIN_LOSSES: Final = 3
"""Losses of one kind without which they are not compared; engineering choice."""
AGREEING_DIGITS: Final = 5
"""Digits to which statistics of the same values agree, in whatever order a device adds them; engineering choice."""
IDENTIFYING: Final = frozenset({"mean", "std", "entropy"})
"""Statistics of which one must be recorded: the others may be equal in all batches."""
STATISTICS: Final = IDENTIFYING | {"max_abs", "zeros", "largest", "distinct"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The same few batches again and again, up to the onset."""

    kinds: int
    """Different batches among those that came `MIN_REPEATS` times and more."""
    came: int
    """How many of the last `window` batches were one of them."""
    window: int
    known: float | None
    """Median loss, from the onset on, of repeated batches over the loss before; `None` with too few."""
    altered: float | None
    """Median loss, from the onset on, of batches that had not come before, over the loss before; `None` as above."""

    @property
    def text(self) -> str:
        """`"60 of the 64 batches before were the same 4 repeated"`."""
        return f"{self.came} of the {self.window} batches before were the same {self.kinds} repeated"


def repeats(view: EpisodeView) -> Repeats | None:
    """How often the batches before the onset were repeated; `None` where most were new or too little was recorded."""
    ordinals = view.store.history.ordinals
    prints = _fingerprints(view)
    before = prints[(ordinals >= view.onset - WINDOW) & (ordinals < view.onset)]
    if prints.shape[1] == 0 or len(before) < MIN_BATCHES:
        return None
    counts = Counter(row.tobytes() for row in before)
    often = {key: count for key, count in counts.items() if count >= MIN_REPEATS}
    came = sum(often.values())
    if len(before) - came > MAX_NEW_SHARE * len(before):
        return None
    after = (ordinals >= view.onset) & (ordinals < view.onset + BATCHES_AFTER)
    old = np.array([row.tobytes() in often for row in prints[after]], dtype=bool)
    losses = view.store.history.series(view.episode.signal)[after]
    known, altered = _relative_level(view, losses[old]), _relative_level(view, losses[~old])
    return Repeats(kinds=len(often), came=came, window=len(before), known=known, altered=altered)


def _fingerprints(view: EpisodeView) -> npt.NDArray[np.float64]:
    """One row per batch that identifies its values: rounded statistics; no columns where nothing was recorded."""
    history = view.store.history
    names = [s for s in history.signals if s.startswith("batch/") and s.rsplit("/", 1)[-1] in STATISTICS]
    if not any(name.rsplit("/", 1)[-1] in IDENTIFYING for name in names):
        return np.zeros((history.ordinals.size, 0))
    values = np.stack([history.series(name) for name in names], axis=1)
    fractions, exponents = np.frexp(values)
    return np.concatenate([np.round(fractions, AGREEING_DIGITS) + 0.0, exponents.astype(np.float64)], axis=1)


def _relative_level(view: EpisodeView, losses: npt.NDArray[np.float64]) -> float | None:
    before = number(view.episode.loss_before)
    known = losses[np.isfinite(losses)]
    if before is None or not before > 0.0 or known.size < MIN_LOSSES:
        return None
    return median(known.tolist()) / before
