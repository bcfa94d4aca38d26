"""`loss_scaling`: in mixed precision the loss scale is far too large (skipped updates) or far too small (underflow).

Seen by: a scale that changed by more than a scaler changes it; three and more of a hundred updates skipped while the
loss was finite; a scale below 1; gradients that are suddenly all 0 in half precision; a replay in float32 without the
damage.

Against it: a run without a gradient scaler (float32, bfloat16); none of the above. Skipped updates while the loss
itself is not finite are a symptom.

Thresholds: one skipped update in 2,000 is usual (science.md 2.2); torch's scaler moves by factors of 2.

To do: the scale from before as `init_scale`, the scaler's own growth; else bfloat16, which needs none.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis.batch_ranges import GUARD, NEAR, REACH, REFERENCE
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import earlier
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

KINDS: Final = ("scale_leapt", "scale_too_low", "often_skipped")
"""Findings of the detector "precision", the strongest first."""
LOST_SHARE: Final = 0.5
"""Share of gradient entries that are 0 or have lost digits from which gradients are lost in half precision;
engineering choice."""
LOST_MORE: Final = 0.3
"""Rise of that share over the usual one: a sparse model always has zeros; engineering choice."""
INITIAL_SCALE: Final = 65536.0
"""Initial scale of torch's scaler (torch 2024)."""


@observer("no scaler", signal="loss_scale")
def has_scaler(view: EpisodeView) -> Observation | None:
    """The premise: a loss scale."""
    text = f"The run has no loss scale (precision {view.facts.precision})."
    return None if "loss_scale" in view.store.history.signals else Observation(text, step=None)


def _finding_of(kind: str) -> Observer:
    """Observe one kind of finding about the scale, by its distance to the onset."""

    def observe(view: EpisodeView) -> Observation | None:
        found = next((f for f in view.once(_findings) if f.kind == kind), None)
        if found is None:
            return None
        level, text, after = _level(view, found), f"At step {found.at.step}: {found.text}", found.number("after")
        observed = found.number("scale") if after is None else after
        return Observation(text, level=level, step=found.at.step, observed=observed, expected=found.number("before"))

    levels = ("no episode", "loss not finite", "long before", "just before", "before", "earlier")
    return Observer(kind, levels, observe, "loss_scale")


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


@observer("lost", signal="grad_underflow")
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
    return Observation(text, observed=now, expected=usual)


@observer("in range", signal="loss_scale")
def scale_in_range(view: EpisodeView) -> Observation | None:
    """A scale that moved as a scaler moves it, and gradients in its range."""
    if view.once(_findings) or lost_gradients(view) is not None:
        return None
    return Observation("The loss scale moved as a scaler moves it, and gradients were within its range.")


def _findings(view: EpisodeView) -> tuple[Finding, ...]:
    """One finding of each kind: the last before the episode, or the first in a run without an episode."""
    if view.store.episodes:
        return tuple(f for kind in KINDS if (f := earlier(view, "precision", kind)) is not None)
    found = [f for f in view.store.findings if f.detector == "precision"]
    first = (next((f for f in found if f.kind == kind), None) for kind in KINDS)
    return tuple(f for f in first if f is not None)


def _scale_before(view: EpisodeView) -> float:
    """The median scale of the updates that were not skipped before the scale went wrong."""
    first = min((f.at.ordinal for f in view.once(_findings)), default=view.onset)
    history = view.store.history
    scale, skipped = history.series("loss_scale"), history.series("skipped_step")
    fine = scale[(history.ordinals < first) & np.isfinite(scale) & (scale >= 1.0) & (skipped == 0.0)]
    return float(np.median(fine)) if fine.size else INITIAL_SCALE


def _summary(view: EpisodeView) -> str:
    found, left = view.once(_findings), "Gradients left the range of half precision under the loss scale before step"
    return f"{found[0].text.rstrip('.') if found else f'{left} {view.step}'}{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    before = _scale_before(view)
    text = (
        f"Begin with a loss scale of {before:.5g}, which the run tolerated: MixedPrecision('16-mixed', device, "
        f"torch.amp.GradScaler(init_scale={before:.5g}, growth_interval=2000)), and look for what sets another."
    )
    other = f"Or train in 'bf16-mixed' in place of '{view.facts.precision}', which needs no loss scale."
    return Fix(text, Change(setting="loss_scale", value=before)), Fix(other)


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
