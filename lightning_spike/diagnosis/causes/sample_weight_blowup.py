"""`sample_weight_blowup`: dynamic sample weights (hard-example mining) grow out of hand."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix
from lightning_spike.diagnosis.observations.course import GAP, Course, Stretch, course, longest, parts
from lightning_spike.diagnosis.observations.tells import batches, tell, without_none
from lightning_spike.records import Change, Evidence, Family

CLEAR: Final = 2.0
"""Times the usual largest weight from which weights are clearly out of the ordinary …"""
EXTREME: Final = 5.0
"""… and from which a few samples have the batch to themselves; engineering choices: in ordinary reweighting the largest weight of a batch differs by less from batch to batch."""
SEVERAL: Final = 3
"""Batches in a row beyond all weights of long before: of 128, three in a row are beyond by chance once in two million."""
HEADROOM: Final = 1.5
"""The cap that is advised, in usual largest weights: ordinary weights stay as they are."""


class SampleWeightBlowup(Cause):
    """Dynamic sample weights (hard-example mining) grow out of hand.

    Seen by: the largest weight of the batches before and at the onset far above all weights of long before; the effective sample size (sum w)^2 / sum w^2 below
    its range, so that few samples make the step; batch after batch, not in one.

    Against it: no weights in the batches; weights as they always were.

    Thresholds: the range is that of up to 128 batches that end 48 before the onset, for what grows slowly has spoilt the nearer ones.

    To do: cap the weights at what they were while training went well; normalise them to a mean of 1 in each batch.
    """

    id: ClassVar = "sample_weight_blowup"
    family: ClassVar = Family.DATA
    title: ClassVar = "Sample weights out of hand"
    explains: ClassVar = frozenset(
        {"bad_batch", "label_noise", "hard_sample_streak", "gradient_explosion", "lr_too_high", "numerical_instability"}
    )

    @override
    def examine(self, case: Case) -> Examination:
        largest = _largest(case)
        if largest is None:
            return Examination(evidence=(_none(case),))
        leaf, told = largest
        cap = float(f"{HEADROOM * told.middle:.2g}")
        observed, usual = _worst(case, told), told.middle
        return Examination(
            evidence=without_none(_size(case, leaf, told), _growing(case, leaf, told), _effective(case, leaf)),
            summary=f"The largest sample weight of a batch is {observed:.3g}, usually {usual:.3g}, and {case.loss_text}.",
            fixes=tuple(
                filter(
                    None,
                    (
                        f"Cap the sample weights: weight = weight.clamp(max={cap:g}), {HEADROOM:g} times the usual largest weight of a batch ({usual:.3g}) in this run.",
                        "Normalise them in each batch, so that the loss keeps its scale: (weight * losses).sum() / weight.sum().",
                        clip_fix(case),
                    ),
                )
            ),
            change=Change(setting="sample_weight_limit", value=cap),
        )


def _largest(case: Case) -> tuple[str, Course] | None:
    """The weights that stand furthest out."""
    found = [
        (leaf, told)
        for leaf in parts(case, "weight", "max_abs")
        if (told := course(case, f"batch/{leaf}/max_abs", case.onset - GAP, _last_start(case) + GUARD)) is not None
    ]
    return max(found, key=lambda pair: pair[1].times(_worst(case, pair[1])), default=None)


def _worst(case: Case, told: Course) -> float:
    """The largest weight up to the onset; after it, those of the next batches, where they go on growing or none is known before."""
    grown = _grown(case, told)
    if grown is not None:
        return grown.furthest
    before = told.values[told.ordinals <= max(case.questioned)]
    return float(before[-GUARD:].max()) if before.size else float(told.values.max())


def _grown(case: Case, told: Course) -> Stretch | None:
    """The batches in a row, from the onset or before on, whose weights lay above all of long before; they may have gone on growing since."""
    out = longest(s for s in told.stretches(above=True) if s.first <= _last_start(case))
    return out if out is not None and out.count >= SEVERAL else None


def _last_start(case: Case) -> int:
    """The last batch from which on weights may have brought the episode about."""
    return max(case.questioned) + case.dated_early


def _none(case: Case) -> Evidence:
    return tell("batch/weight/max_abs", "No sample weights were seen in the batches.", -DECISIVE, step=case.step)


def _size(case: Case, leaf: str, told: Course) -> Evidence:
    worst = _worst(case, told)
    times = told.times(worst) if worst > told.high else 1.0
    weight = DECISIVE if times >= EXTREME else STRONG if times >= CLEAR else -DECISIVE
    text = f"Around step {case.step} the largest weight of '{leaf}' is {worst:.3g}, usually {told.middle:.3g}."
    return tell(told.signal, text, weight, step=case.step, observed=worst, expected=told.middle)


def _growing(case: Case, leaf: str, told: Course) -> Evidence | None:
    out = _grown(case, told)
    if out is None:
        return None
    text = f"The largest weight of '{leaf}' lay above all of long before in {batches(out.count)} from step {case.step_of(out.first)} on."
    return tell(told.signal, text, FAIR, step=case.step_of(out.first), observed=out.furthest, expected=told.middle)


def _effective(case: Case, leaf: str) -> Evidence | None:
    """Weights that all grow alike leave the effective sample size as it is: that is no sign against them."""
    told = course(case, f"batch/{leaf}/ess", case.onset - GUARD, max(case.questioned))
    if told is None or not math.isfinite(told.middle):
        return None
    least = float(told.values.min())
    if not least < told.low:
        return None
    text = (
        f"The weights of '{leaf}' leave {least:.0%} of a batch's samples effective (Kish), usually {told.middle:.0%}."
    )
    return tell(told.signal, text, SLIGHT, step=case.step, observed=least, expected=told.middle)
