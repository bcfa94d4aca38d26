"""How far updates move the weights, against the weights' own size."""

import dataclasses
import sys
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.records import Moment
from lightning_spike.store import TrainerStateStore

LONG: Final = 0.01
"""Median share of their size by which updates change the weights, from which steps are long: ten times what is usual in
a training that goes well (1e-3; science.md 2.2), a tenth of where TheDeepChecker draws its line for any single one."""
FEWEST: Final = 12
"""Measured updates without which nothing is said."""
AFTER: Final = 128
"""Batches after an event through which updates must be long for it to have made them so."""
WILD: Final = 0.1
"""Share of their size by which a single update changes the weights, from which it throws them away rather than improves
them (TheDeepChecker: between 1e-4 and 1e-1)."""
START: Final = 64
"""First batches of a run in which such an update spoils the initialisation."""
RAMP: Final = 2
"""Updates that a warm-up takes at least: the rate of the very first may be anything."""
SOON: Final = 8
"""Lengths of the warm-up within which a decay from its peak has halved the rate: with the inverse square root it takes
four (Vaswani et al. 2017)."""
FALLS: Final = 0.9
"""Level of the last quarter over that of the second, below which the loss goes on falling."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WildStart:
    """Updates at the start of the run that have thrown the initial weights away."""

    share: float
    """The largest share of their size by which one of them changed the weights."""
    after: Moment
    """The batch after the last of them."""
    before: float
    """Norm of the weights at the first that was measured …"""
    grown: float
    """… and the largest by the end of the start."""

    @property
    def text(self) -> str:
        """In words."""
        moved = (
            f" Their norm went from {self.before:.3g} to {self.grown:.3g} by batch {START}."
            if self.grown > self.before
            else ""
        )
        return f"In the first updates a single one changed the weights, or those of half of the layers, by {self.share:.0%} of their size (at most {WILD:.0%} is sound).{moved}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LongSteps:
    """Updates that are long against the weights, and go on being so."""

    share: float
    """Median of the update's norm over the weights', over the newer half of the run."""
    last: Moment
    """The newest of them."""

    @property
    def text(self) -> str:
        """In words."""
        return f"Through the second half of the run an update changed the weights by {self.share:.1%} of their size (usually about 0.1 %)."


def update_shares(store: TrainerStateStore) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The rows of the history in which both were measured and are above 0, and in them the update's norm over the weights'; each of shape `(n,)`, oldest first; pure."""
    lengths, sizes = store.history.series("update_norm"), store.history.series("weight_norm")
    rows = np.flatnonzero(np.isfinite(lengths) & np.isfinite(sizes) & (lengths > 0.0) & (sizes > 0.0))
    with np.errstate(over="ignore"):  # of a run that is past all measure the share may be infinite
        return rows, lengths[rows] / sizes[rows]


def long_steps(store: TrainerStateStore) -> LongSteps | None:
    """Whether updates were long through the second half of the run, with weights that they have long since grown used to; pure. `None` where not, or where they were not measured.

    In the first updates of a run a larger share is usual; and a rate that soon came down from an early peak is still on
    its way. Weights that the steps have blown up hide it, for it is a share of their size.
    """
    history, (rows, shares) = store.history, update_shares(store)
    newer = shares[rows >= len(history) // 2]
    if newer.size < FEWEST or passed_early_peak(store):
        return None
    share = float(np.median(newer))
    last = history.moment(int(history.ordinals[rows[-1]]))
    return LongSteps(share=share, last=last) if share >= LONG and last is not None else None


def lengthened(store: TrainerStateStore, ordinal: int) -> bool:
    """Whether updates were short before a batch and long after it; pure."""
    rows, shares = update_shares(store)
    ordinals = store.history.ordinals[rows]
    before, after = shares[ordinals < ordinal], shares[(ordinals > ordinal) & (ordinals <= ordinal + AFTER)]
    if before.size < FEWEST // 2 or after.size < FEWEST // 2:
        return False
    return float(np.median(before)) < LONG / 2.0 and float(np.median(after)) >= LONG


def wild_start(store: TrainerStateStore) -> WildStart | None:
    """Whether the first updates of a run changed the weights by a tenth of their size and more, as a whole or half of the layers; pure. `None` where not, where the run was resumed, or where they were not measured.

    The weights of a large embedding, few of which an update concerns, make up most of the whole and hide what becomes
    of the rest. Layers are asked only where the loss has not come down since.
    """
    history, (rows, shares) = store.history, update_shares(store)
    early = history.ordinals[rows] < START
    rows, shares = rows[early], shares[early]
    layers = {} if goes_on_falling(store) else _middle_layer(store)  # Adam's first steps are long against small weights
    shares = np.maximum(shares, [layers.get(int(ordinal), 0.0) for ordinal in history.ordinals[rows]])
    if store.facts.first_step > 0 or not (shares >= WILD).any():
        return None
    after = history.moment(int(history.ordinals[rows[np.flatnonzero(shares >= WILD)[-1]]]) + 1)
    if after is None:
        return None
    sizes = history.series("weight_norm")[rows]
    return WildStart(share=float(shares.max()), after=after, before=float(sizes[0]), grown=float(sizes.max()))


def _middle_layer(store: TrainerStateStore) -> dict[int, float]:
    """By ordinal the median share by which an early update changed the weights of a layer of torch.

    Without biases, which begin at 0. Of what is still held.
    """
    changes, sizes = (
        {
            row.at.ordinal: dict(zip(store.layer_names.get(signal, ()), row.values.tolist(), strict=False))
            for row in store.layer_rows(signal, 0, START)
        }
        for signal in ("update_norm", "weight_norm")
    )
    weights = store.layer_names.get("initial_scale", ())
    shares = {
        ordinal: [
            change[n] / sizes[ordinal][n]
            for n in weights
            if change.get(n, -1.0) >= 0.0 and sizes[ordinal].get(n, 0.0) > 0.0
        ]
        for ordinal, change in changes.items()
        if ordinal in sizes
    }
    return {ordinal: float(np.median(of)) for ordinal, of in shares.items() if of and np.isfinite(of).all()}


def passed_early_peak(store: TrainerStateStore) -> bool:
    """Whether a learning rate rose to the highest of the run in its first updates and was down to half of that soon after, as by a warm-up and a decay from its peak; pure."""
    return any(_passed_early_peak(store, name) for name in store.history.signals if name.startswith("lr-"))


def _passed_early_peak(store: TrainerStateStore, signal: str) -> bool:
    rates = store.history.before(signal, sys.maxsize, len(store.history))
    if rates.size == 0 or store.facts.first_step > 0:
        return False
    peak = int(np.argmax(rates))
    rose = RAMP <= peak < START and rates[peak] >= 2.0 * rates[0]
    return rose and float(rates[peak : SOON * (peak + 1)].min()) <= 0.5 * float(rates[peak])


def goes_on_falling(store: TrainerStateStore, signal: str = "loss") -> bool:
    """Whether the loss is clearly lower in the last quarter of the run than it was in the second; pure."""
    losses = store.history.series(signal)
    quarters = [part[np.isfinite(part)] for part in np.array_split(losses, 4)]
    if any(part.size == 0 for part in quarters):
        return False
    second, last = float(np.median(quarters[1])), float(np.median(quarters[3]))
    return last < FALLS * second if second > 0.0 else last < second
