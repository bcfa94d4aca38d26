"""`data_drift`: the input distribution moves: augmentation gone extreme, a new source, a changed normalisation."""

import sys
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.detectors.stagnation import stagnates
from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, NEAR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.batch_parts import input_known
from lightning_spike.diagnosis.observations.course import GAP, Course, Stretch, course, longest, parts
from lightning_spike.diagnosis.observations.order import one_sided
from lightning_spike.diagnosis.observations.quiet import Shown, rise_after
from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.observations.tells import batches, lone_batch, tell, without_none
from lightning_spike.records import Change, Evidence, Family, Moment
from lightning_spike.store import TrainerStateStore

IN_A_ROW: Final = 8
"""Batches on one side of all of long before from which it is the data that have moved, and no bad batch (science.md 2b.6: the same sign in at least eight)."""
AHEAD: Final = 32
"""Batches after the onset that are looked at: whether it stays so."""
FAR: Final = 6.0
"""Standard errors of the moving average from which the inputs have moved; without a fault it stays below over several epochs (test of `DataMonitor`) …"""
SURELY: Final = 12.0
"""… and from which one bad stretch cannot have done it: what a batch adds is cut off, so that eight of them in a row make nine."""
TWICE: Final = 2.0
"""… and times as far as ever before."""
STATISTICS: Final = ("mean", "std", "max_abs")
DRIFT: Final = "/drift"
"""What the name of an input's moving average ends with."""


class DataDrift(Cause):
    """The input distribution moves: augmentation gone extreme, a new source, a changed normalisation.

    Seen by: mean, spread or maximum of an input on one side of all of long before in at least eight batches in a row that begin before or with the trouble, and stay there; the moving
    average of the inputs far from where the run began (for tokens: of how often each occurs). The loss rises with it, over some batches.

    Against it: inputs as always; one odd batch; values that come back or cross over to the other side, as in a stretch that came sorted.

    Thresholds: the range is that of up to 128 batches that end 48 before the onset, for what moves slowly has spoilt the nearer ones.

    To do: find what changed at the step where the move began; limit the augmentation, or normalise by each source's own mean and spread.
    """

    id: ClassVar = "data_drift"
    family: ClassVar = Family.DATA
    tested_by: ClassVar = frozenset({"data"})
    title: ClassVar = "The data have moved"
    explains: ClassVar = frozenset({"bad_batch", "label_noise", "gradient_explosion", "numerical_instability"})

    @override
    def shown(self, store: TrainerStateStore) -> Shown | None:
        began = _left(store)
        if began is None:
            return None
        rise = rise_after(store, began.ordinal)
        if rise is not None:
            return Shown(at=rise.begun, rise=rise)
        # Larger inputs make a steeper loss surface: steps that have become too long are the drift's trace.
        long = any((f.detector, f.kind) == ("lab", "steps_too_long") for f in store.findings)
        since = store.history.between("loss", began.ordinal, sys.maxsize)
        return Shown(at=began) if long or stagnates(since) else None

    @override
    def examine(self, case: Case) -> Examination:
        if (again := repeats(case)) is not None:
            text = f"{again.came} of the {again.window} batches before were the same {again.kinds} again and again: what a few batches look like is no distribution."
            return Examination(evidence=(tell("batch/input", text, -DECISIVE, step=case.step),))
        moved, drift = _moved(case), _drift(case)
        if moved is None and drift is None:
            return Examination(evidence=(_as_ever(case),))
        began = _began(case, moved)
        told = None if moved is None else (moved[0].signal, moved[1].furthest, moved[1].usual)
        words = "the mix of its tokens" if told is None else f"{told[0]} went from {told[2]:.3g} to {told[1]:.3g}"
        return Examination(
            evidence=without_none(
                None if moved is None else _stretch(case, *moved),
                None if moved is None else _stays(case, *moved),
                drift if drift is not None else _still(case),
                None if drift is None else _goes_on(case),
                _at_once(case, moved),
                _sorted(case),
                lone_batch(case, -FAIR),
            ),
            summary=f"The inputs have moved from about step {began} on ({words}), and {case.loss_text}.",
            fixes=_fixes(case, began, moved),
            change=_change(moved),
        )


def _left(store: TrainerStateStore) -> Moment | None:
    """The first batch at which the moving average of an input had left its range, of those that surely have moved by now; `None` where none has."""
    history = store.history
    found = [
        moment for signal in history.signals if _is_drift(signal) if (moment := _left_range(store, signal)) is not None
    ]
    return min(found, key=lambda moment: moment.ordinal, default=None)


def _left_range(store: TrainerStateStore, signal: str) -> Moment | None:
    """Nothing where the average has come back by the end: a stretch is over then, and the net has seen both."""
    history = store.history
    known = np.flatnonzero(np.isfinite(history.series(signal)))
    values = history.series(signal)[known]
    if values.size < AHEAD or not float(np.median(values[-IN_A_ROW:])) > SURELY:
        return None
    inside = np.flatnonzero(values <= FAR)
    first = int(inside[-1]) + 1 if inside.size else 0
    return history.moment(int(history.ordinals[known[first]]))


def _as_ever(case: Case) -> Evidence:
    if not input_known(case):
        return tell("batch/input", "Of the inputs nothing is known.", -STRONG, step=case.step)
    return tell("batch/input", "The inputs around the onset are as they always were.", -DECISIVE, step=case.step)


def _moved(case: Case) -> tuple[Course, Stretch] | None:
    """The statistic that lay longest out of its range, begun before the trouble or with it."""
    signals = [f"batch/{leaf}/{name}" for name in STATISTICS for leaf in parts(case, "input", name)]
    found = [
        (told, out)
        for signal in signals
        if (told := course(case, signal, case.onset - GAP, case.onset + AHEAD)) is not None
        and (out := longest(s for up in (True, False) for s in told.stretches(above=up))) is not None
        and out.count >= IN_A_ROW
        and out.first <= case.onset + GUARD
    ]
    return max(found, key=lambda pair: pair[1].count, default=None)


def _stretch(case: Case, told: Course, out: Stretch) -> Evidence:
    side = "above" if out.above else "below"
    text = (
        f"{told.signal} lay {side} all of long before in {batches(out.count)} in a row from step {case.step_of(out.first)} on "
        f"(up to {out.furthest:.3g}, usually {out.usual:.3g})."
    )
    return tell(told.signal, text, DECISIVE, step=case.step_of(out.first), observed=out.furthest, expected=out.usual)


def _stays(case: Case, told: Course, out: Stretch) -> Evidence | None:
    """What has moved stays; a stretch that came sorted goes from one side over to the other and back."""
    other = longest(told.stretches(above=not out.above))
    if other is not None and other.count >= NEAR:
        text = f"Then it lay on the other side of all of long before in {batches(other.count)}."
        return tell(told.signal, text, -FAIR, step=case.step_of(other.first))
    if out.last >= int(told.ordinals[-1]) - 1:
        return tell(told.signal, "It stays there.", SLIGHT, step=case.step_of(out.last))
    return None


def _drift(case: Case) -> Evidence | None:
    """The moving average, which looks back over some thirty batches and so follows a while later."""
    found = [
        (told, float(told.values.max()))
        for leaf in _drifting(case)
        if (told := course(case, f"batch/{leaf}/drift", case.onset, case.onset + AHEAD)) is not None
    ]
    far = [(told, most) for told, most in found if most > max(FAR, TWICE * told.high)]
    if not far:
        return None
    told, most = max(far, key=lambda pair: pair[1])
    text = f"The moving average of the inputs went {most:.3g} standard errors away from where the run began, before at most {told.high:.3g}."
    weight = DECISIVE if most > SURELY else STRONG
    return tell(told.signal, text, weight, step=case.step, observed=most, expected=told.middle)


def _goes_on(case: Case) -> Evidence | None:
    """What bad batches add to the moving average fades behind them."""
    for leaf in _drifting(case):
        told = course(case, f"batch/{leaf}/drift", case.onset, case.onset + AHEAD)
        if told is not None and told.values.size >= AHEAD // 2 and np.argmax(told.values) >= 0.75 * told.values.size:
            text = f"It still went further {batches(int(np.argmax(told.values)))} after the onset."
            return tell(
                told.signal, text, FAIR, step=case.step, observed=float(told.values.max()), expected=told.middle
            )
    return None


def _drifting(case: Case) -> tuple[str, ...]:
    names = [s for s in case.store.history.signals if _is_drift(s)]
    return tuple(name.removeprefix("batch/").removesuffix(DRIFT) for name in names)


def _is_drift(signal: str) -> bool:
    return signal.startswith("batch/input") and signal.endswith(DRIFT)


def _still(case: Case) -> Evidence | None:
    if not _drifting(case):
        return None
    return tell("batch/input/drift", "The moving average of the inputs has not gone far.", -FAIR, step=case.step)


def _at_once(case: Case, moved: tuple[Course, Stretch] | None) -> Evidence | None:
    """A loss that jumped long after everything had moved has another reason."""
    if moved is None or case.onset - moved[1].first < GAP - NEAR:
        return None
    return tell(moved[0].signal, "The inputs had moved long before the loss rose.", -FAIR, step=case.step)


def _sorted(case: Case) -> Evidence | None:
    """Inputs move as well where samples of one kind come in a row."""
    found = one_sided(case)
    if found is None:
        return None
    text = f"The targets are less mixed than ever in {batches(found[1].count)}: the samples came sorted, which moves the inputs for a while."
    return tell(found[0], text, -STRONG, step=case.step, observed=found[1].furthest, expected=found[1].usual)


def _began(case: Case, moved: tuple[Course, Stretch] | None) -> int:
    return case.step if moved is None else case.step_of(moved[1].first)


def _fixes(case: Case, began: int, moved: tuple[Course, Stretch] | None) -> tuple[str, ...]:
    if moved is None:
        first = f"Find what came into the data at about step {began} (a new source, another tokenizer) and mix it in slowly with the old one."
    else:
        told, _ = moved
        limit = f"{told.low:.3g} to {told.high:.3g}"
        first = f"Bring {told.signal.removeprefix('batch/')} back to {limit}, its range before step {began}: limit the augmentation or normalise by each source's own mean and spread."
    return (
        first,
        f"Find what changed at about step {began}: augmentation schedule, source, decoding, normalisation; BadBatchDumper has the batch of step {case.step}.",
        "Where the new data are meant to be: a lower learning rate while the net gets used to them, and old samples in every batch.",
    )


def _change(moved: tuple[Course, Stretch] | None) -> Change:
    """Values that have grown can be limited to what they were; all else has to be normalised."""
    if moved is not None and moved[0].signal.endswith("/max_abs") and moved[1].above:
        return Change(setting="input_limit", value=float(f"{moved[0].high:.3g}"))
    return Change(setting="normalisation", value=None if moved is None else moved[0].signal.split("/")[1])
