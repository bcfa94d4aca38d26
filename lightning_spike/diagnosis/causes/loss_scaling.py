"""`loss_scaling`: in mixed precision the loss scale is far too large, so that updates are skipped, or far too small, so that gradients underflow.

Seen by: a scale that moved by more than a scaler moves it; three and more of a hundred updates skipped while the loss
was finite; a scale below 1; gradients that are suddenly all 0 in half precision; a replay in float32, in which the
damage is not done.

Against it: a run without a gradient scaler (float32, bfloat16); none of the above. Skipped updates while the loss
itself is not finite are a symptom.

Thresholds: one skipped update in 2,000 is usual (science.md 2.4); torch's scaler moves by factors of 2.

To do: the scale from before as `init_scale`, the scaler's own growth; else bfloat16, which needs none.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.constants import GUARD, NEAR, REACH, REFERENCE
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import earlier
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

KINDS: Final = ("scale_leapt", "scale_too_low", "often_skipped")
"""Findings of the detector "precision", the most telling first."""
LOST_SHARE: Final = 0.5
"""Share of the gradients' entries that are 0 or have lost digits from which they are lost in half precision;
engineering choice …"""
LOST_MORE: Final = 0.3
"""… if it is so much more than usual: a sparse model has zeros all along."""
INITIAL_SCALE: Final = 65536.0
"""Scale that torch's scaler begins with (torch 2024)."""


@observer("no scaler")
def has_scaler(view: EpisodeView) -> Observation | None:
    """The premise: a loss scale."""
    if "loss_scale" in view.store.history.signals:
        return None
    text = f"The run has no loss scale (precision {view.facts.precision})."
    return Observation(level="no scaler", text=text, signal="loss_scale")


def _finding_of(kind: str) -> Observer:
    """A finding about the scale, by its distance to the onset."""

    def observe(view: EpisodeView) -> Observation | None:
        found = next((f for f in view.once(_findings) if f.kind == kind), None)
        if found is None:
            return None
        observed = found.number("after")
        return Observation(
            level=_level(view, found), text=f"At step {found.at.step}: {found.text}", signal="loss_scale",
            step=found.at.step, observed=found.number("scale") if observed is None else observed,
            expected=found.number("before"),
        )  # fmt: skip

    return Observer(kind, ("no episode", "loss not finite", "long before", "just before", "before", "earlier"), observe)


def _level(view: EpisodeView, found: Finding) -> str:
    lag = view.onset - found.at.ordinal
    if not view.store.episodes:
        return "no episode"
    if view.kind is EpisodeKind.NONFINITE and found.kind != "scale_leapt":
        return "loss not finite"
    if lag > 4 * REFERENCE:
        return "long before"
    if lag <= NEAR:
        return "just before"
    return "before" if lag <= REACH else "earlier"


@observer("lost")
def lost_gradients(view: EpisodeView) -> Observation | None:
    """The newest look at the gradients up to the episode, against the first ones of the run."""
    history = view.store.history
    zeros, below = history.series("grad_zeros"), history.series("grad_underflow")
    until = view.onset if view.store.episodes else int(history.ordinals[-1])
    shares = (zeros + below)[(history.ordinals <= until) & np.isfinite(zeros) & np.isfinite(below)]
    if shares.size < GUARD:
        return None
    usual, now = float(np.median(shares[: shares.size // 2])), float(shares[-1])
    if now < LOST_SHARE or now < usual + LOST_MORE:
        return None
    text = f"{now:.0%} of the gradients' entries are 0 or have lost digits in half precision, usually {usual:.0%}."
    return Observation(level="lost", text=text, signal="grad_underflow", step=view.step, observed=now, expected=usual)


@observer("in range")
def scale_in_range(view: EpisodeView) -> Observation | None:
    """A scale that moved as a scaler moves it, and gradients in its range."""
    if view.once(_findings) or lost_gradients(view) is not None:
        return None
    text = "The loss scale moved as a scaler moves it, and gradients were within its range."
    return Observation(level="in range", text=text, signal="loss_scale", step=view.step)


def _findings(view: EpisodeView) -> tuple[Finding, ...]:
    """One finding of each kind from before the episode; in a run whose loss shows nothing, the first of each."""
    if view.store.episodes:
        return tuple(f for kind in KINDS if (f := earlier(view, "precision", kind)) is not None)
    found = [f for f in view.store.findings if f.detector == "precision"]
    first = (next((f for f in found if f.kind == kind), None) for kind in KINDS)
    return tuple(f for f in first if f is not None)


def _scale_before(view: EpisodeView) -> float:
    """The scale from before it went wrong: the usual one of the run's updates that were not skipped up to then."""
    first = min((f.at.ordinal for f in view.once(_findings)), default=view.onset)
    history = view.store.history
    scale, skipped = history.series("loss_scale"), history.series("skipped_step")
    fine = scale[(history.ordinals < first) & np.isfinite(scale) & (scale >= 1.0) & (skipped == 0.0)]
    return float(np.median(fine)) if fine.size else INITIAL_SCALE


def _summary(view: EpisodeView) -> str:
    then = f", and {view.loss_text}" if view.store.episodes else ""
    found = view.once(_findings)
    if not found:
        return f"Gradients left the range of half precision under the loss scale before step {view.step}{then}."
    return f"{found[0].text.rstrip('.')}{then}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    before = _scale_before(view)
    return (
        Fix(
            f"Begin with a loss scale of {before:.5g}, which the run tolerated: MixedPrecision('16-mixed', device, "
            f"torch.amp.GradScaler(init_scale={before:.5g}, growth_interval=2000)), and look for what sets another.",
            Change(setting="loss_scale", value=before),
        ),
        Fix(f"Or train in 'bf16-mixed' in place of '{view.facts.precision}', which needs no loss scale."),
    )


TESTED_BY: Final = frozenset({Group.NUMERICS})

CAUSE: Final = Cause(
    id="loss_scaling",
    family=Family.ENVIRONMENT,
    title="The loss scale of mixed precision",
    meaning="mixed precision: the loss scale overflows or underflows",
    requires=(has_scaler,),
    observations=(*map(_finding_of, KINDS), lost_gradients, scale_in_range, split_of_jump(TESTED_BY)),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({"gradient_vanishing", "adam_epsilon_too_small"}),
    tested_by=TESTED_BY,
    sufficient_findings=frozenset(("precision", kind) for kind in KINDS),
)
