"""`gradient_explosion`: gradients grow through depth or time with no other cause upstream, unclipped."""

import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, Excess
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix, clip_value
from lightning_spike.diagnosis.observations.held import EXPLODED, held_gradient
from lightning_spike.diagnosis.observations.rates import steady_rate
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    batches,
    early_gradient,
    gradient_in_range,
    lone_batch,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, Evidence, Family

LARGE: Final = 3.0
"""… from which it is large: what an outlier of a batch may well bring."""
ADAPTIVE: Final = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad")
"""Optimizers whose step a single large gradient cannot lengthen beyond about three times (Kingma & Ba: at most (1 - b1) / sqrt(1 - b2))."""


class GradientExplosion(Cause):
    """Gradients grow through depth or time with no other cause upstream, unclipped.

    Seen by: a gradient norm far out of its range in updates *before* the loss rose, with an ordinary batch and an ordinary learning rate.

    Against it: norms that were in their range until the loss itself jumped (then they are its symptom); clipping by norm that was on; Adam and its like,
    whose step one large gradient cannot lengthen, unless the lab finds that it did its harm out of the state; a loss that was back at once. Whatever lies upstream (a bad batch, a restart, a rate too high) takes its
    evidence away: a symptom never outranks its cause.

    Thresholds: out of range is by the norms' own history on the log scale; 10 times the usual norm is an explosion (AUTOTRAINER and TheDeepChecker use
    absolute values, which do not carry over between models; science.md 2.2).

    To do: clip at a value taken from the healthy norms; look at the parameter that grew most.
    """

    id: ClassVar = "gradient_explosion"
    family: ClassVar = Family.GRADIENT
    tested_by: ClassVar = frozenset({"intrinsic", "clipping"})
    title: ClassVar = "Exploding gradients"

    @override
    def examine(self, case: Case) -> Examination:
        lead, held = early_gradient(case), held_gradient(case)
        if held is not None and case.oddities(held.ordinal):
            held = None  # an odd batch has an odd gradient: what the state holds is of its making
        evidence = without_none(
            _lead(case, lead),
            gradient_in_range(case, -STRONG) if held is None else None,
            _clipped(case),
            _adaptive(case),
            _steady(case) if lead is not None else None,
            _in_the_state(case, held),
            lone_batch(case, -SLIGHT),
            batch_value(case, ordinary=SLIGHT if lead is not None else 0.0, odd=-STRONG),
            split_verdict(case, {"data": -STRONG, "weights": FAIR, "noise": -FAIR}),
        )
        layer = _grown_most(case, lead)
        return Examination(
            evidence=evidence,
            summary=_summary(case, lead, layer),
            fixes=_fixes(case, layer),
            change=Change(setting="gradient_clip_val", value=clip_value(case) or 1.0),
            confirmed=False if case.split == "data" else None,
        )


def _lead(case: Case, lead: Excess | None) -> Evidence | None:
    excess = lead if lead is not None else case.excess("grad_norm", case.onset)
    if excess is None or not excess.above:
        return None
    times = f"{excess.ratio:.3g} times" if math.isfinite(excess.ratio) else "not finite, against"
    when = (
        f"{batches(case.onset - excess.ordinal)} before the loss rose"
        if lead is not None
        else "in the batch whose loss jumped"
    )
    weight = SLIGHT
    if lead is not None:
        weight = _weight(lead.ratio)
    return tell(
        "grad_norm",
        f"The gradient norm was {times} its usual {excess.expected:.3g}, {when}.",
        weight,
        step=case.step,
        observed=excess.observed if math.isfinite(excess.observed) else None,
        expected=excess.expected,
    )


def _weight(ratio: float) -> float:
    """From `EXPLODED` on the log of the ratio: a step a hundred times too long cannot but do damage. A norm that is not finite is no step at all, but a NaN."""
    if not math.isfinite(ratio):
        return SLIGHT
    return max(STRONG, min(math.log(ratio), DECISIVE)) if ratio >= EXPLODED else FAIR if ratio >= LARGE else SLIGHT


def _clipped(case: Case) -> Evidence | None:
    value = case.facts.gradient_clip_val
    if value is None or case.facts.gradient_clip_algorithm != "norm":
        return None
    text = f"Gradients are clipped to a norm of {value:g}, so a large one does not make a large step."
    return tell("grad_norm/after_clip", text, -DECISIVE, step=case.step, observed=value)


def _adaptive(case: Case) -> Evidence | None:
    names = [o.class_name for o in case.facts.optimizers]
    if not names or not all(name in ADAPTIVE for name in names):
        return None
    return tell(
        "grad_norm",
        f"{names[0]} scales its step by the gradient's own size, so one large gradient cannot explode it.",
        -SLIGHT,
        step=case.step,
    )


def _in_the_state(case: Case, held: Excess | None) -> Evidence | None:
    """Damage that the experiments give to the optimizer's state, in later updates than that of the exploded gradient: that gradient is what it holds."""
    if held is None:
        return None
    text = f"The experiments give the damage to what the optimizer's state held later, and that was the gradient of step {case.step_of(held.ordinal)}."
    return tell("lab/factors", text, REPLAYED, step=case.step, observed=held.observed, expected=held.expected)


def _steady(case: Case) -> Evidence | None:
    if not steady_rate(case):
        return None
    return tell("lr", "The learning rate had no event near the onset.", SLIGHT, step=case.step)


def _grown_most(case: Case, lead: Excess | None) -> tuple[str, float] | None:
    """The parameter whose gradient norm grew most against its own usual one, and by what factor."""
    at = lead.ordinal if lead is not None else case.onset
    names = case.store.layer_names.get("grad_norm", ())
    now = case.store.layer_rows("grad_norm", at, at)
    usual = case.store.layer_rows("grad_norm", at - 64, at - 9)
    if not now or not usual or any(len(row.values) != len(names) for row in (*now, *usual)):
        return None
    middle = np.median(np.stack([row.values for row in usual]), axis=0)
    norms = np.asarray(now[-1].values, dtype=np.float64)
    factors = np.where(np.isfinite(norms) & (middle > 0.0), norms / np.where(middle > 0.0, middle, 1.0), 0.0)
    place = int(np.argmax(factors)) if factors.size else 0
    return (names[place], float(factors[place])) if factors.size and factors[place] > 1.0 else None


def _summary(case: Case, lead: Excess | None, layer: tuple[str, float] | None) -> str:
    most = f", most in {layer[0]} ({layer[1]:.3g} times)" if layer is not None else ""
    excess = lead if lead is not None else case.excess("grad_norm", case.onset)
    if excess is None:
        return f"The gradients exploded at step {case.step}, and {case.loss_text}."
    return f"The gradient norm went from {excess.expected:.3g} to {excess.observed:.3g}{most}, and {case.loss_text}."


def _fixes(case: Case, layer: tuple[str, float] | None) -> tuple[str, ...]:
    clip = (
        clip_fix(case)
        or "Clip the gradient norm: Trainer(gradient_clip_val=1.0); GradNormMonitor shows what is usual in this run."
    )
    look = (
        f"Look at {layer[0]}, whose gradient grew {layer[1]:.3g} times: its initial scale, a norm layer before it."
        if layer is not None
        else None
    )
    return tuple(filter(None, (clip, look)))
