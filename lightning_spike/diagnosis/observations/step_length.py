"""How far updates move the weights, relative to the norm of the weights."""

import dataclasses
import sys
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.records import Moment
from lightning_spike.store import TrainerStateStore

LONG_STEP_SHARE: Final = 0.01
"""Median relative size of updates from which steps are long: ten times what is usual in a training that goes well
(1e-3; science.md 2.2), a tenth of TheDeepChecker's limit for a single one."""
MIN_MEASURED_UPDATES: Final = 12
"""Measured updates without which nothing is said; engineering choice."""
BATCHES_AFTER: Final = 128
"""Batches after an event in which updates must be long for the event to have made them so; engineering choice."""
MAX_STEP_SHARE: Final = 0.1
"""Relative size of a single update from which it throws the weights away (TheDeepChecker: between 1e-4 and 1e-1)."""
FIRST_BATCHES: Final = 64
"""First batches of a run in which such an update spoils the initialisation; engineering choice."""
MIN_WARMUP: Final = 2
"""Updates that a warm-up takes at least: the rate of the very first may be anything; engineering choice."""
HALVED_WITHIN: Final = 8
"""Lengths of the warm-up within which a decay from its peak has halved the rate: with the inverse square root it takes
four (Vaswani et al. 2017)."""
FALLING_SHARE: Final = 0.9
"""Loss level of the run's last quarter over that of the second below which the loss keeps falling;
engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OversizedUpdates:
    """Updates at the start of the run that threw the initial weights away."""

    share: float
    """The largest relative size of one of them."""
    after: Moment
    """The batch after the last of them."""
    before: float
    """Norm of the weights at the first measured update."""
    grown: float
    """The largest norm by the end of the start."""

    @property
    def text(self) -> str:
        """Two sentences with the numbers."""
        moved = f" Their norm went from {self.before:.3g} to {self.grown:.3g} by batch {FIRST_BATCHES}."
        return (
            f"One of the first updates changed the weights, or those of half of the layers, by {self.share:.0%} of "
            f"their size (at most {MAX_STEP_SHARE:.0%} is sound).{moved if self.grown > self.before else ''}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LongSteps:
    """Updates that stay long through the run."""

    share: float
    """Median relative size over the second half of the run."""
    last: Moment
    """The newest of them."""

    @property
    def text(self) -> str:
        """One sentence with the numbers."""
        return (
            "Through the second half of the run an update changed the weights by "
            f"{self.share:.1%} of their size (usually about 0.1 %)."
        )


def update_shares(store: TrainerStateStore) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Rows of the history with a measured update, and the update's norm over the weights' norm; pure.

    Returns:
        Two arrays of shape `(n,)`, oldest first.
    """
    lengths, sizes = store.history.series("update_norm"), store.history.series("weight_norm")
    rows = np.flatnonzero(np.isfinite(lengths) & np.isfinite(sizes) & (lengths > 0.0) & (sizes > 0.0))
    with np.errstate(over="ignore"):  # in a run that has blown up the share may be infinite
        return rows, lengths[rows] / sizes[rows]


def long_steps(store: TrainerStateStore) -> LongSteps | None:
    """Long updates through the second half of the run; `None` where they were not long or not measured; pure.

    The first updates of a run may be longer, and a rate that fell soon after an early peak is still on its way. Weights
    that the steps have blown up hide it, because it is relative to their size.
    """
    history, (rows, shares) = store.history, update_shares(store)
    newer = shares[rows >= len(history) // 2]
    if newer.size < MIN_MEASURED_UPDATES or passed_early_peak(store):
        return None
    share = float(np.median(newer))
    last = history.moment(int(history.ordinals[rows[-1]]))
    return LongSteps(share=share, last=last) if share >= LONG_STEP_SHARE and last is not None else None


def lengthened(store: TrainerStateStore, ordinal: int) -> bool:
    """Whether updates were short before a batch and long after it; pure."""
    rows, shares = update_shares(store)
    ordinals = store.history.ordinals[rows]
    before, after = shares[ordinals < ordinal], shares[(ordinals > ordinal) & (ordinals <= ordinal + BATCHES_AFTER)]
    if min(before.size, after.size) < MIN_MEASURED_UPDATES // 2:
        return False
    return float(np.median(before)) < LONG_STEP_SHARE / 2.0 and float(np.median(after)) >= LONG_STEP_SHARE


def oversized_first_updates(store: TrainerStateStore) -> OversizedUpdates | None:
    """Updates of a tenth of the weights' size and more at the start of the run; pure.

    They count over all weights, or in half of the layers where the loss has not fallen since. A large embedding, of
    which an update changes little, would hide what happens to the other weights.

    Returns:
        `None` where there are none, where the run was resumed, or where updates were not measured.
    """
    history, (rows, shares) = store.history, update_shares(store)
    early = history.ordinals[rows] < FIRST_BATCHES
    rows, shares = rows[early], shares[early]
    layers = {} if keeps_falling(store) else _median_layer(store)  # Adam's first steps are long against small weights
    shares = np.maximum(shares, [layers.get(int(ordinal), 0.0) for ordinal in history.ordinals[rows]])
    oversized = np.flatnonzero(shares >= MAX_STEP_SHARE)
    after = history.moment(int(history.ordinals[rows[oversized[-1]]]) + 1) if oversized.size else None
    if store.facts.first_step > 0 or after is None:
        return None
    sizes = history.series("weight_norm")[rows]
    return OversizedUpdates(share=float(shares.max()), after=after, before=float(sizes[0]), grown=float(sizes.max()))


def _median_layer(store: TrainerStateStore) -> dict[int, float]:
    """Median over the layers of the relative size of each early update, by ordinal; biases, which begin at 0, apart."""
    changes, sizes = (_early_rows(store, signal) for signal in ("update_norm", "weight_norm"))
    layers = store.layer_names.get("initial_scale", ())
    found = {}
    for ordinal, change in changes.items():
        size = sizes.get(ordinal, {})
        shares = [change[n] / size[n] for n in layers if change.get(n, -1.0) >= 0.0 and size.get(n, 0.0) > 0.0]
        if shares and np.isfinite(shares).all():
            found[ordinal] = float(np.median(shares))
    return found


def _early_rows(store: TrainerStateStore, signal: str) -> dict[int, dict[str, float]]:
    names = store.layer_names.get(signal, ())
    rows = store.layer_rows(signal, 0, FIRST_BATCHES)
    return {row.at.ordinal: dict(zip(names, row.values.tolist(), strict=False)) for row in rows}


def passed_early_peak(store: TrainerStateStore) -> bool:
    """Whether a rate had its peak in the first updates and soon fell to half of it (warm-up, then decay); pure."""
    return any(_passed_early_peak(store, name) for name in store.history.signals if name.startswith("lr-"))


def _passed_early_peak(store: TrainerStateStore, signal: str) -> bool:
    rates = store.history.before(signal, sys.maxsize, len(store.history))
    if rates.size == 0 or store.facts.first_step > 0:
        return False
    peak = int(np.argmax(rates))
    rose = MIN_WARMUP <= peak < FIRST_BATCHES and rates[peak] >= 2.0 * rates[0]
    return rose and float(rates[peak : HALVED_WITHIN * (peak + 1)].min()) <= 0.5 * float(rates[peak])


def keeps_falling(store: TrainerStateStore) -> bool:
    """Whether the loss is clearly lower in the last quarter of the run than in the second; pure."""
    quarters = [part[np.isfinite(part)] for part in np.array_split(store.history.series("loss"), 4)]
    if any(part.size == 0 for part in quarters):
        return False
    second, last = float(np.median(quarters[1])), float(np.median(quarters[3]))
    return last < FALLING_SHARE * second if second > 0.0 else last < second
