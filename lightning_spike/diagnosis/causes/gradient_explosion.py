"""`gradient_explosion`: gradients grow through depth or time with no other cause upstream, unclipped.

Seen by: a gradient norm far out of its range in updates *before* the loss rose, with an ordinary batch and an ordinary
learning rate.

Against it: norms in their range until the loss itself jumped (then they are its symptom); clipping by norm; Adam and
similar optimizers, whose step one large gradient cannot lengthen, unless the lab finds that it did damage through the
optimizer's state; a loss that recovered at once. Evidence for an upstream cause (a bad batch, a restart, a rate too
high) is subtracted.

Thresholds: out of range is by the norms' own history on the log scale; 10 times the usual norm is an explosion
(AUTOTRAINER and TheDeepChecker use absolute values, which do not carry over between models; science.md 2.2).

To do: clip at a value taken from the healthy norms; look at the parameter whose gradient grew most.
"""

import dataclasses
import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, clip_value
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer, only_if
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.gradient_in_state import EXPLODED_FACTOR, exploded_gradient_in_state
from lightning_spike.diagnosis.observations.rates import steady_rate
from lightning_spike.diagnosis.observations.shared_evidence import (
    LARGE_GRADIENT_FACTOR,
    batch_values,
    before_rise,
    early_gradient,
    finite,
    gradient_in_range,
    transient_loss,
)
from lightning_spike.diagnosis.view import EpisodeView, Excess
from lightning_spike.records import Change, Family

FACTORS: Final = (
    (100.0, "100-fold"),
    (50.0, "50-fold"),
    (EXPLODED_FACTOR, "10-fold"),
    (LARGE_GRADIENT_FACTOR, "3-fold"),
)
"""Multiples of the usual norm, by level."""
ADAPTIVE: Final = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad")
"""Optimizers whose step a single large gradient lengthens at most about three times (Kingma & Ba 2015)."""


@observer("100-fold", "50-fold", "10-fold", "3-fold", "somewhat", "non-finite", "with the loss", signal="grad_norm")
def gradient_before(view: EpisodeView) -> Observation | None:
    """How far the gradient norm was out of its range before the loss rose."""
    lead = early_gradient(view)
    excess = lead if lead is not None else view.excess("grad_norm", view.onset)
    if excess is None or not excess.above:
        return None
    level, when = "with the loss", ", in the batch whose loss jumped"
    if lead is not None:
        level, when = _level(excess.ratio), before_rise(view.onset - excess.ordinal)
    size = f"{sentences.times(excess.ratio)} its" if math.isfinite(excess.ratio) else "not finite, against a"
    text = f"The gradient norm was {size} usual {excess.expected:.3g}{when}."
    return Observation(text, level=level, observed=finite(excess.observed), expected=excess.expected)


def _level(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "non-finite"
    return next((name for factor, name in FACTORS if ratio >= factor), "somewhat")


norms_in_range = only_if(lambda view: view.once(_in_state) is None, gradient_in_range, "norms_in_range")


@observer("clipped", signal="grad_norm/after_clip")
def clipping(view: EpisodeView) -> Observation | None:
    """Clipping by norm was on."""
    value = view.facts.gradient_clip_val
    if value is None or view.facts.gradient_clip_algorithm != "norm":
        return None
    text = f"Gradients are clipped to a norm of {value:g}, so a large one does not make a large step."
    return Observation(text, observed=value)


@observer("adaptive", signal="grad_norm")
def optimizer(view: EpisodeView) -> Observation | None:
    """An optimizer that scales its step by the gradient's own size."""
    names = [o.class_name for o in view.facts.optimizers]
    if not names or not all(name in ADAPTIVE for name in names):
        return None
    text = f"{names[0]} scales its step by the gradient's own size, so one large gradient cannot explode it."
    return Observation(text)


@observer("steady", signal="lr")
def rate(view: EpisodeView) -> Observation | None:
    """A learning rate without an event, where the gradient led the loss."""
    if early_gradient(view) is None or not steady_rate(view):
        return None
    return Observation("The learning rate had no event near the onset.")


@observer("holds the exploded gradient", signal="lab/attribution")
def optimizer_state(view: EpisodeView) -> Observation | None:
    """Replay gives the damage of later updates to the optimizer's state, which holds the exploded gradient."""
    held = view.once(_in_state)
    if held is None:
        return None
    state = f"The optimizer's state held the exploded gradient of step {view.step_of(held.ordinal)}."
    text = f"{sentences.jump(view.experiments)} {state}"
    return Observation(text, observed=held.observed, expected=held.expected)


@observer("ordinary after a large gradient", "ordinary", "odd", name="batch_values")
def batch(view: EpisodeView) -> Observation | None:
    """The values of the batch; ordinary ones weigh more where a gradient led the loss."""
    found = batch_values(view)
    if found is None or found.level == "odd" or early_gradient(view) is None:
        return found
    return dataclasses.replace(found, level="ordinary after a large gradient")


def _in_state(view: EpisodeView) -> Excess | None:
    """The exploded gradient in the optimizer's state, unless its batch was odd and explains the gradient."""
    held = exploded_gradient_in_state(view)
    return None if held is not None and view.oddities(held.ordinal) else held


def _grown_most(view: EpisodeView) -> tuple[str, float] | None:
    """The parameter whose gradient norm grew by the largest factor, and the factor; `None` if none grew."""
    lead = early_gradient(view)
    at = view.onset if lead is None else lead.ordinal
    names = view.store.layer_names.get("grad_norm", ())
    now = view.store.layer_rows("grad_norm", at, at)
    usual = view.store.layer_rows("grad_norm", at - 64, at - 9)
    if not now or not usual or any(len(row.values) != len(names) for row in (*now, *usual)):
        return None
    middle = np.median(np.stack([row.values for row in usual]), axis=0)
    norms = np.asarray(now[-1].values, dtype=np.float64)
    factors = np.where(np.isfinite(norms) & (middle > 0.0), norms / np.where(middle > 0.0, middle, 1.0), 0.0)
    place = int(np.argmax(factors)) if factors.size else 0
    return (names[place], float(factors[place])) if factors.size and factors[place] > 1.0 else None


def _summary(view: EpisodeView) -> str:
    lead, layer = early_gradient(view), _grown_most(view)
    most = "" if layer is None else f", most in {layer[0]} ({sentences.times(layer[1])})"
    excess = lead if lead is not None else view.excess("grad_norm", view.onset)
    if excess is None:
        return f"The gradients exploded at step {view.step}, and {view.loss_text}."
    return f"The gradient norm went from {excess.expected:.3g} to {excess.observed:.3g}{most}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    layer = _grown_most(view)
    text = "Clip the gradient norm: Trainer(gradient_clip_val=1.0); GradNormMonitor shows what is usual in this run."
    clip = clip_fix(view) or (Fix(text, Change(setting="gradient_clip_val", value=clip_value(view) or 1.0)),)
    if layer is None:
        return clip
    growth = sentences.times(layer[1])
    look = f"Look at {layer[0]}, whose gradient grew {growth}: its initial scale, a norm layer before it."
    return (*clip, Fix(look))


TESTED_BY: Final = frozenset({Group.INTRINSIC, Group.CLIPPING})

CAUSE: Final = Cause(
    id="gradient_explosion",
    family=Family.GRADIENT,
    title="Exploding gradients",
    meaning="gradients grow through depth or time with no other cause upstream, unclipped",
    observations=(
        gradient_before,
        norms_in_range,
        clipping,
        optimizer,
        rate,
        optimizer_state,
        transient_loss,
        batch,
        split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    tested_by=TESTED_BY,
)
