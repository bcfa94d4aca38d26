"""`data_drift`: the input distribution moves: extreme augmentation, a new source, a changed normalisation.

Seen by: mean, spread or maximum of an input outside its earlier range, on one side, in at least eight batches in a row
that begin before the onset or with it, and stay there; the moving average of the inputs far from that of the run's
start (for tokens: of their frequencies). The loss rises with it, over some batches.

Against it: inputs in their range; one odd batch; values that come back or cross over to the other side, as in a stretch
of sorted samples.

Thresholds: the range is that of up to 128 batches that end 48 before the onset, because a slow change affects the
nearer ones.

To do: find what changed at the step where the move began; limit the augmentation, or normalise by each source's own
mean and spread.
"""

import sys
from typing import Final

import numpy as np

from lightning_spike.detectors.stagnation import stagnates
from lightning_spike.diagnosis.batch_ranges import GUARD, NEAR
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer
from lightning_spike.diagnosis.observations.batch_parts import input_known
from lightning_spike.diagnosis.observations.experiments import first_long_test
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.reference_range import (
    RECENT_BATCHES,
    SeriesRange,
    Stretch,
    longest,
    parts,
    reference_range,
)
from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.observations.sample_order import sorted_samples
from lightning_spike.diagnosis.observations.shared_evidence import batches, transient_loss
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family, Moment
from lightning_spike.store import TrainerStateStore

MIN_BATCHES_IN_A_ROW: Final = 8
"""Batches in a row on one side of the earlier range from which it is a drift and no bad batch (science.md 2b.6: the
same sign in at least eight)."""
BATCHES_AFTER: Final = 32
"""Batches after the onset that show whether the change stays; engineering choice."""
MOVED_ERRORS: Final = 6.0
"""Standard errors of the moving average from which the inputs have moved: without a fault it stays below over several
epochs (test of `DataMonitor`); engineering choice."""
SURELY_MOVED_ERRORS: Final = 12.0
"""Standard errors from which one bad stretch cannot have done it: eight bad batches in a row give nine, because the
contribution of a batch is capped; engineering choice."""
FARTHER_THAN_BEFORE: Final = 2.0
"""Multiple of the largest earlier distance that it must exceed too; engineering choice."""
LATE_PEAK_SHARE: Final = 0.75
"""Relative place of the maximum after the onset from which the average still moves; engineering choice."""
STATISTICS: Final = ("mean", "std", "max_abs")
DRIFT: Final = "/drift"
"""End of the name of an input's moving average."""


@observer("the same few batches", signal="batch/input")
def few_batches(view: EpisodeView) -> Observation | None:
    """The premise: batches are drawn from a distribution, and are not the same few over and over."""
    found = view.once(repeats)
    return None if found is None else Observation(f"{found.text}: a few batches make no distribution.")


@observer("unknown", "in range", signal="batch/input")
def inputs_in_range(view: EpisodeView) -> Observation | None:
    """The premise: some input has moved."""
    if view.once(_moved) is not None or view.once(drift) is not None:
        return None
    if not input_known(view):
        return Observation("The inputs were not recorded.", level="unknown")
    return Observation("The inputs around the onset are in their earlier range.", level="in range")


@observer("out of range")
def stretch_out_of_range(view: EpisodeView) -> Observation | None:
    """The statistic that was out of its earlier range for longest."""
    moved = view.once(_moved)
    if moved is None:
        return None
    series, out = moved
    side, step = "above" if out.above else "below", view.step_of(out.first)
    values = f"(up to {out.furthest:.3g}, usually {out.usual:.3g})"
    text = (
        f"{series.signal} lay {side} its earlier range in {batches(out.count)} in a row from step {step} on {values}."
    )
    return Observation(text, signal=series.signal, step=step, observed=out.furthest, expected=out.usual)


@observer("crosses over", "stays")
def stays_out(view: EpisodeView) -> Observation | None:
    """A drift stays; a stretch of sorted samples crosses over to the other side and comes back."""
    moved = view.once(_moved)
    if moved is None:
        return None
    series, out = moved
    other = longest(series.stretches(above=not out.above))
    if other is not None and other.count >= NEAR:
        text, step = f"Then it lay on the other side in {batches(other.count)}.", view.step_of(other.first)
        return Observation(text, level="crosses over", signal=series.signal, step=step)
    if out.last < int(series.ordinals[-1]) - 1:
        return None
    return Observation("It stays there.", level="stays", signal=series.signal, step=view.step_of(out.last))


@observer("surely moved", "moved", "not far")
def drift(view: EpisodeView) -> Observation | None:
    """The moving average, which looks back over some thirty batches and so follows a while later."""
    far = [s for s in _averages(view) if float(s.values.max()) > max(MOVED_ERRORS, FARTHER_THAN_BEFORE * s.high)]
    if not far:
        return None
    farthest = max(far, key=lambda s: float(s.values.max()))
    most = float(farthest.values.max())
    text = (
        f"The moving average of the inputs is up to {most:.3g} standard errors away from where the run began; "
        f"before, at most {farthest.high:.3g}."
    )
    level = "surely moved" if most > SURELY_MOVED_ERRORS else "moved"
    return Observation(text, level=level, signal=farthest.signal, observed=most, expected=farthest.middle)


@observer("not far", signal="batch/input/drift")
def _no_drift(view: EpisodeView) -> Observation | None:
    return Observation("The moving average of the inputs has not moved far.") if _drifting(view) else None


@observer("still moving")
def drift_goes_on(view: EpisodeView) -> Observation | None:
    """A drift goes on; the effect of bad batches on the moving average fades after them."""
    if view.once(drift) is None:
        return None
    for series in _averages(view):
        peak, highest = int(np.argmax(series.values)), float(series.values.max())
        if series.values.size >= BATCHES_AFTER // 2 and peak >= LATE_PEAK_SHARE * series.values.size:
            text = f"It still moved further {batches(peak)} after the onset."
            return Observation(text, signal=series.signal, observed=highest, expected=series.middle)
    return None


@observer("long before")
def moved_long_before(view: EpisodeView) -> Observation | None:
    """Inputs that had moved long before the loss jumped, which then has another cause."""
    moved = view.once(_moved)
    if moved is None or view.onset - moved[1].first < RECENT_BATCHES - NEAR:
        return None
    return Observation("The inputs had moved long before the loss rose.", signal=moved[0].signal)


def _moved(view: EpisodeView) -> tuple[SeriesRange, Stretch] | None:
    """The statistic that was out of its range for longest, from the onset or before on; `None` without one."""
    signals = [f"batch/{leaf}/{name}" for name in STATISTICS for leaf in parts(view, "input", name)]
    first, last = view.onset - RECENT_BATCHES, view.onset + BATCHES_AFTER
    series = [s for signal in signals if (s := reference_range(view, signal, first, last)) is not None]
    found = [(s, longest(o for up in (True, False) for o in s.stretches(above=up))) for s in series]
    moved = [(s, out) for s, out in found if out is not None and out.first <= view.onset + GUARD]
    long = [(s, out) for s, out in moved if out.count >= MIN_BATCHES_IN_A_ROW]
    return max(long, key=lambda pair: pair[1].count, default=None)


def _averages(view: EpisodeView) -> list[SeriesRange]:
    """The moving averages of the inputs after the onset."""
    first, last = view.onset, view.onset + BATCHES_AFTER
    return [s for signal in _drifting(view) if (s := reference_range(view, signal, first, last)) is not None]


def _drifting(view: EpisodeView) -> tuple[str, ...]:
    return tuple(s for s in view.store.history.signals if _is_drift(s))


def _is_drift(signal: str) -> bool:
    return signal.startswith("batch/input") and signal.endswith(DRIFT)


def _shown(store: TrainerStateStore) -> Shown | None:
    """Where an input surely moved, and then the loss rose or stopped falling, or steps became too long.

    Larger inputs make a steeper loss surface.
    """
    left = (_left_range(store, signal) for signal in store.history.signals if _is_drift(signal))
    began = min((at for at in left if at is not None), key=lambda at: at.ordinal, default=None)
    if began is None:
        return None
    rise = rise_after(store, began.ordinal)
    if rise is not None:
        return Shown(at=rise.begun, rise=rise)
    since = store.history.between("loss", began.ordinal, sys.maxsize)
    return Shown(at=began) if first_long_test(store) is not None or stagnates(since) else None


def _left_range(store: TrainerStateStore, signal: str) -> Moment | None:
    """The first batch at which a moving average left its range; `None` where it has come back by the end."""
    history = store.history
    known = np.flatnonzero(np.isfinite(history.series(signal)))
    values = history.series(signal)[known]
    if values.size < BATCHES_AFTER or not float(np.median(values[-MIN_BATCHES_IN_A_ROW:])) > SURELY_MOVED_ERRORS:
        return None
    inside = np.flatnonzero(values <= MOVED_ERRORS)
    first = int(inside[-1]) + 1 if inside.size else 0
    return history.moment(int(history.ordinals[known[first]]))


def _began(view: EpisodeView) -> int:
    moved = view.once(_moved)
    return view.step if moved is None else view.step_of(moved[1].first)


def _summary(view: EpisodeView) -> str:
    moved = view.once(_moved)
    what = "the mix of its tokens"
    if moved is not None:
        what = f"{moved[0].signal} from {moved[1].usual:.3g} to {moved[1].furthest:.3g}"
    return f"The inputs have moved from about step {_began(view)} on ({what}), and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    began = _began(view)
    changed = "augmentation schedule, source, decoding, normalisation"
    return (
        _bring_back(view, began),
        Fix(f"Find what changed at about step {began}: {changed}; BadBatchDumper has the batch of step {view.step}."),
        Fix("If the new data are wanted: lower the learning rate for a while, and mix old samples into every batch."),
    )


def _bring_back(view: EpisodeView, began: int) -> Fix:
    """Limit values that have grown; normalise all others."""
    moved = view.once(_moved)
    if moved is None:
        source = "a new source, another tokenizer"
        text = f"Find what came into the data at about step {began} ({source}) and mix it in slowly."
        return Fix(text, Change(setting="normalisation", value=None))
    series, out = moved
    text = (
        f"Bring {series.signal.removeprefix('batch/')} back to {series.low:.3g} to {series.high:.3g}, its range before "
        f"step {began}: limit the augmentation, or normalise by each source's own mean and spread."
    )
    if series.signal.endswith("/max_abs") and out.above:
        return Fix(text, Change(setting="input_limit", value=float(f"{series.high:.3g}")))
    return Fix(text, Change(setting="normalisation", value=series.signal.split("/")[1]))


CAUSE: Final = Cause(
    id="data_drift",
    family=Family.DATA,
    title="The data have moved",
    meaning="the input distribution moves: extreme augmentation, a new source, a changed normalization",
    requires=(few_batches, inputs_in_range),
    observations=(
        stretch_out_of_range,
        stays_out,
        first_of("drift", drift, _no_drift),
        drift_goes_on,
        moved_long_before,
        sorted_samples,
        transient_loss,
    ),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"bad_batch", "label_noise", "numerical_instability"}),
    tested_by=frozenset({Group.DATA}),
    shown=_shown,
)
