"""`data_drift`: the input distribution moves: augmentation gone extreme, a new source, a changed normalisation.

Seen by: mean, spread or maximum of an input outside its earlier range, on one side, in at least eight batches in a row
that begin before or with the trouble, and stay there; the moving average of the inputs far from where the run began
(for tokens: of how often each occurs). The loss rises with it, over some batches.

Against it: inputs in their range; one odd batch; values that come back or cross over to the other side, as in a stretch
that came sorted.

Thresholds: the range is that of up to 128 batches that end 48 before the onset, for what moves slowly has spoilt the
nearer ones.

To do: find what changed at the step where the move began; limit the augmentation, or normalise by each source's own
mean and spread.
"""

import sys
from typing import Final

import numpy as np

from lightning_spike.detectors.stagnation import stagnates
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.constants import GUARD, NEAR
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.batch_parts import input_known
from lightning_spike.diagnosis.observations.experiments import first_long_test
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.reference_range import (
    GAP,
    SeriesRange,
    Stretch,
    longest,
    parts,
    reference_range,
)
from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.observations.sample_order import one_sided
from lightning_spike.diagnosis.observations.shared_evidence import batches, transient_loss
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family, Moment
from lightning_spike.store import TrainerStateStore

MIN_BATCHES_IN_A_ROW: Final = 8
"""Batches on one side of the earlier range from which the data have moved, and it is no bad batch (science.md 2b.6: the
same sign in at least eight)."""
BATCHES_AFTER: Final = 32
"""Batches after the onset that are looked at, to see whether it stays; engineering choice."""
MOVED_ERRORS: Final = 6.0
"""Standard errors of the moving average from which the inputs have moved; without a fault it stays below over several
epochs (test of `DataMonitor`); engineering choice …"""
SURELY_MOVED_ERRORS: Final = 12.0
"""… and from which one bad stretch cannot have done it: what a batch adds is cut off, so that eight of them in a row
make nine."""
FARTHER_THAN_BEFORE: Final = 2.0
"""… and times as far as ever before."""
LATE_PEAK_SHARE: Final = 0.75
"""Place of the maximum in the batches after the onset from which the average still moves; engineering choice."""
STATISTICS: Final = ("mean", "std", "max_abs")
DRIFT: Final = "/drift"
"""What the name of an input's moving average ends with."""


@observer("the same few batches")
def few_batches(view: EpisodeView) -> Observation | None:
    """The premise: batches are drawn from a distribution, and are not the same few over and over."""
    found = view.once(repeats)
    if found is None:
        return None
    text = (
        f"{found.came} of the {found.window} batches before were the same {found.kinds} repeated: "
        "a few batches make no distribution."
    )
    return Observation(level="the same few batches", text=text, signal="batch/input", step=view.step)


@observer("unknown", "in range")
def inputs_in_range(view: EpisodeView) -> Observation | None:
    """The premise: some input has moved."""
    if view.once(_moved) is not None or view.once(drift) is not None:
        return None
    if not input_known(view):
        return Observation(level="unknown", text="The inputs were not recorded.", signal="batch/input", step=view.step)
    text = "The inputs around the onset are in their earlier range."
    return Observation(level="in range", text=text, signal="batch/input", step=view.step)


@observer("out of range")
def stretch_out_of_range(view: EpisodeView) -> Observation | None:
    """The statistic that lay longest out of its earlier range."""
    moved = view.once(_moved)
    if moved is None:
        return None
    series, out = moved
    side, step = "above" if out.above else "below", view.step_of(out.first)
    text = (
        f"{series.signal} lay {side} its earlier range in {batches(out.count)} in a row from step {step} on "
        f"(up to {out.furthest:.3g}, usually {out.usual:.3g})."
    )
    return Observation(
        level="out of range", text=text, signal=series.signal, step=step, observed=out.furthest, expected=out.usual
    )


@observer("crosses over", "stays")
def stays_out(view: EpisodeView) -> Observation | None:
    """What has moved stays; a stretch that came sorted goes from one side over to the other and back."""
    moved = view.once(_moved)
    if moved is None:
        return None
    series, out = moved
    other = longest(series.stretches(above=not out.above))
    if other is not None and other.count >= NEAR:
        text = f"Then it lay on the other side of its earlier range in {batches(other.count)}."
        return Observation(level="crosses over", text=text, signal=series.signal, step=view.step_of(other.first))
    if out.last < int(series.ordinals[-1]) - 1:
        return None
    return Observation(level="stays", text="It stays there.", signal=series.signal, step=view.step_of(out.last))


@observer("surely moved", "moved", "not far")
def drift(view: EpisodeView) -> Observation | None:
    """The moving average, which looks back over some thirty batches and so follows a while later."""
    series = [s for leaf in _drifting(view) if (s := _average(view, leaf)) is not None]
    far = [s for s in series if float(s.values.max()) > max(MOVED_ERRORS, FARTHER_THAN_BEFORE * s.high)]
    if not far:
        return None
    farthest = max(far, key=lambda s: float(s.values.max()))
    most = float(farthest.values.max())
    text = (
        f"The moving average of the inputs went {most:.3g} standard errors away from where the run began; "
        f"before, at most {farthest.high:.3g}."
    )
    return Observation(
        level="surely moved" if most > SURELY_MOVED_ERRORS else "moved", text=text, signal=farthest.signal,
        step=view.step, observed=most, expected=farthest.middle,
    )  # fmt: skip


@observer(*drift.levels, name="drift")
def drift_or_none(view: EpisodeView) -> Observation | None:
    """The moving average, said too where it has not gone far."""
    found = view.once(drift)
    if found is not None or not _drifting(view):
        return found
    text = "The moving average of the inputs has not gone far."
    return Observation(level="not far", text=text, signal="batch/input/drift", step=view.step)


@observer("still moving")
def drift_goes_on(view: EpisodeView) -> Observation | None:
    """What bad batches add to the moving average fades behind them; a drift goes on."""
    if view.once(drift) is None:
        return None
    for series in (s for leaf in _drifting(view) if (s := _average(view, leaf)) is not None):
        peak = int(np.argmax(series.values))
        if series.values.size >= BATCHES_AFTER // 2 and peak >= LATE_PEAK_SHARE * series.values.size:
            text = f"It still moved further {batches(peak)} after the onset."
            return Observation(
                level="still moving", text=text, signal=series.signal, step=view.step,
                observed=float(series.values.max()), expected=series.middle,
            )  # fmt: skip
    return None


@observer("long before")
def moved_long_before(view: EpisodeView) -> Observation | None:
    """A loss that jumped long after everything had moved has another reason."""
    moved = view.once(_moved)
    if moved is None or view.onset - moved[1].first < GAP - NEAR:
        return None
    text = "The inputs had moved long before the loss rose."
    return Observation(level="long before", text=text, signal=moved[0].signal, step=view.step)


@observer("one-sided")
def sorted_samples(view: EpisodeView) -> Observation | None:
    """Inputs move as well where samples of one kind come in a row."""
    found = view.once(one_sided)
    if found is None:
        return None
    text = f"The targets are less mixed than ever in {batches(found[1].count)}: sorted samples move the inputs for a while."
    return Observation(
        level="one-sided",
        text=text,
        signal=found[0],
        step=view.step,
        observed=found[1].furthest,
        expected=found[1].usual,
    )


def _moved(view: EpisodeView) -> tuple[SeriesRange, Stretch] | None:
    """The statistic that lay longest out of its range, begun before the trouble or with it."""
    signals = [f"batch/{leaf}/{name}" for name in STATISTICS for leaf in parts(view, "input", name)]
    first, last = view.onset - GAP, view.onset + BATCHES_AFTER
    series = [s for signal in signals if (s := reference_range(view, signal, first, last)) is not None]
    found = [
        (s, out) for s in series
        if (out := longest(o for up in (True, False) for o in s.stretches(above=up))) is not None
        and out.count >= MIN_BATCHES_IN_A_ROW and out.first <= view.onset + GUARD
    ]  # fmt: skip
    return max(found, key=lambda pair: pair[1].count, default=None)


def _average(view: EpisodeView, leaf: str) -> SeriesRange | None:
    return reference_range(view, f"batch/{leaf}{DRIFT}", view.onset, view.onset + BATCHES_AFTER)


def _drifting(view: EpisodeView) -> tuple[str, ...]:
    names = [s for s in view.store.history.signals if _is_drift(s)]
    return tuple(name.removeprefix("batch/").removesuffix(DRIFT) for name in names)


def _is_drift(signal: str) -> bool:
    return signal.startswith("batch/input") and signal.endswith(DRIFT)


def _shown(store: TrainerStateStore) -> Shown | None:
    """Where an input surely moved, and the loss rose, steps became too long (larger inputs make a steeper loss surface) or the loss stopped falling."""
    left = [
        at for signal in store.history.signals if _is_drift(signal) and (at := _left_range(store, signal)) is not None
    ]
    began = min(left, key=lambda at: at.ordinal, default=None)
    if began is None:
        return None
    rise = rise_after(store, began.ordinal)
    if rise is not None:
        return Shown(at=rise.begun, rise=rise)
    since = store.history.between("loss", began.ordinal, sys.maxsize)
    return Shown(at=began) if first_long_test(store) is not None or stagnates(since) else None


def _left_range(store: TrainerStateStore, signal: str) -> Moment | None:
    """The first batch at which a moving average had left its range; `None` where it has come back by the end."""
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
    return (
        _bring_back(view, began),
        Fix(
            f"Find what changed at about step {began}: augmentation schedule, source, decoding, normalisation; "
            f"BadBatchDumper has the batch of step {view.step}."
        ),
        Fix("If the new data are wanted: lower the learning rate for a while, and mix old samples into every batch."),
    )


def _bring_back(view: EpisodeView, began: int) -> Fix:
    """Values that have grown can be limited to what they were; all else has to be normalised."""
    moved = view.once(_moved)
    if moved is None:
        text = f"Find what came into the data at about step {began} (a new source, another tokenizer) and mix it in slowly."
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
        drift_or_none,
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
