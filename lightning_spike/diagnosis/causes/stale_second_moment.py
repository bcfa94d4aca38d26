"""`stale_second_moment`: Adam's v_t lags behind gradients that grew, so the update is far too large.

Seen by: RMS_t = sqrt(mean(g² / v)) above 2.3 and above the run's own before the loss rose, while gradients grew over
many batches (finding `second_moment_stale`, given also where the loss has tolerated it); a replay that gives the damage
to the second moments.

Against it: an optimizer without second moments; RMS_t in its range; a learning rate with an event of its own, or a
batch out of range.

Thresholds: Wortsman et al. 2023. A single look above 2.3 is common where coordinates had no gradient before, so that
one alone shows little.

To do: a lower beta2, short enough to follow the measured growth; clip by norm below the grown gradients.
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import REACH, REFERENCE
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer, premise
from lightning_spike.diagnosis.observations.experiments import finer_shares, split_of_jump
from lightning_spike.diagnosis.observations.outside import earlier
from lightning_spike.diagnosis.observations.rates import steady_rate
from lightning_spike.diagnosis.observations.shared_evidence import (
    LARGE_GRADIENT_FACTOR,
    batch_values,
    early_gradient,
    finite,
    transient_loss,
)
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family, Finding

STALE_RMS: Final = 2.3
"""RMS_t from which spikes follow within 1 to 8 updates (Wortsman et al. 2023)."""
ABOVE_USUAL: Final = 2.0
"""Factor over the run's own RMS_t from which it is high: healthy small nets have 1 to 2; engineering choice."""
RARE_SHARE: Final = 0.05
"""Share of the healthy looks above 2.3 up to which one is rare: one look in twenty; engineering choice."""
GROWTH_BATCHES: Final = 40
"""Batches over which growth is measured: four looks of the monitor; engineering choice."""
SHORTER: Final = (0.99, 0.95, 0.9)
"""Second betas to choose from (0.99 or 0.95; engineering choice); the lower, the faster gradients may grow."""


has_second_moment = premise(
    "has_second_moment",
    lambda view: view.beta2 is not None or "update_rms" in view.store.history.signals or not view.facts.optimizers,
    "none", "The optimizer has no second moment.", signal="beta2", step=None,
)  # fmt: skip
"""The premise: an optimizer with second moments."""


@observer("stale just before", "stale long before", signal="update_rms")
def _stale_finding(view: EpisodeView) -> Observation | None:
    found = view.once(_finding)
    if found is None:
        return None
    is_near = not view.store.episodes or view.onset - found.at.ordinal <= GROWTH_BATCHES
    level = "stale just before" if is_near else "stale long before"
    return Observation(f"At step {found.at.step}: {found.text}", level=level, step=found.at.step)


@observer("unknown", "up to date", "high", "often high", signal="update_rms")
def _rms(view: EpisodeView) -> Observation | None:
    """RMS_t just before the onset against healthy values."""
    values = view.store.history.between("update_rms", view.onset - REACH, view.onset - 1)
    values = values[~np.isnan(values)]
    usual = view.before("update_rms", REFERENCE)
    if values.size == 0 or usual.size == 0:
        return Observation("Nothing shows a second moment out of date.", level="unknown")
    high, middle = float(values.max()), float(np.median(usual))
    level = "high"
    if high < max(STALE_RMS, ABOVE_USUAL * middle):
        level = "up to date"
    elif float(np.mean(usual >= STALE_RMS)) > RARE_SHARE or not math.isfinite(high):
        level = "often high"
    text = f"RMS_t of the update was {high:.3g} before, usually {middle:.3g}."
    return Observation(text, level=level, observed=finite(high), expected=middle)


@observer("not grown", "grown", signal="grad_norm")
def gradient_growth(view: EpisodeView) -> Observation | None:
    """Growth of the gradients before the onset; without growth the second moment does not lag."""
    if view.once(_finding) is not None:
        return None
    lead = early_gradient(view)
    if lead is None:
        return Observation("The gradients had not grown before.", level="not grown")
    if lead.ratio < LARGE_GRADIENT_FACTOR or not math.isfinite(lead.ratio):
        return None
    text = f"The gradient norm had grown to {lead.observed:.3g} (usually {lead.expected:.3g})."
    return Observation(text, level="grown", observed=lead.observed, expected=lead.expected)


@observer("refuted", "undecided", "second moments", "momentum", "state", signal="lab/attribution")
def optimizer_share(view: EpisodeView) -> Observation | None:
    """The share of the jump that replay gives to the optimizer's state, and which part of the state."""
    share = view.shares.get(Group.OPTIMIZER, 0.0)
    if not view.shares:
        return None
    return Observation(sentences.jump(view.experiments), level=_share_level(view, share), observed=share)


def _share_level(view: EpisodeView, share: float) -> str:
    if share < judgement.CONFIRMING_SHARE:
        return "refuted" if share <= judgement.REFUTING_SHARE else "undecided"
    shares = finer_shares(view)
    if shares.get("second_moments", 0.0) > max(shares.get("momentum", 0.0), 0.0):
        return "second moments"
    return "momentum" if shares else "state"


@observer("event", signal="lr")
def rate(view: EpisodeView) -> Observation | None:
    """A learning rate with an event of its own."""
    is_moving = view.rate_signals and not steady_rate(view)
    return Observation("The learning rate had an event just before.") if is_moving else None


def _finding(view: EpisodeView) -> Finding | None:
    found = earlier(view, "optimizer", "second_moment_stale")
    return found if found is not None and found.at.ordinal <= view.onset else None


def _beta2(view: EpisodeView) -> tuple[float, str]:
    """The largest advised beta2 that follows the growth, and the reason.

    v lags by less than a factor of two where 1 - beta2 is at least 1 - 1 / s², with s the growth in each batch.
    """
    found = view.once(_finding)
    until = view.onset if found is None else found.at.ordinal
    norms = view.store.history.between("grad_norm", until - GROWTH_BATCHES, until)
    norms = norms[np.isfinite(norms) & (norms > 0.0)]
    beta2 = 1.0 if view.beta2 is None else view.beta2
    lower = [value for value in SHORTER if value < beta2] or [SHORTER[-1]]
    if norms.size < GROWTH_BATCHES // 2:
        return lower[0], "its memory is shorter, so that it follows gradients that grow"
    slope = float(np.polyfit(np.arange(norms.size), np.log(norms), 1)[0])
    need = math.exp(-2.0 * max(slope, 0.0))
    value = next((v for v in lower if v <= need), lower[-1])
    growth, memory = f"{math.expm1(slope):.1%}", f"{1.0 / (1.0 - value):.0f}"
    return value, f"the gradients grew by {growth} in each batch, which a memory of {memory} updates follows"


def _summary(view: EpisodeView) -> str:
    found = view.once(_finding)
    rms = None if found is None else found.number("rms")
    high = "" if rms is None else f" (RMS_t {rms:.3g} and more)"
    step = view.step if found is None else found.at.step
    outgrown = f"By step {step} the gradients had outgrown Adam's second moment{high}"
    return f"{outgrown}, so that updates were too long{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    value, why = _beta2(view)
    instead = "" if view.beta2 is None else f" in place of {view.beta2:g}"
    return (Fix(f"Use beta2 = {value:g}{instead}: {why}.", Change(setting="betas", value=value)), *clip_fix(view))


CAUSE: Final = Cause(
    id="stale_second_moment",
    family=Family.OPTIMIZER,
    title="A second moment out of date",
    meaning="Adam's v_t lags behind gradients that grew, so the update is far too large",
    requires=(has_second_moment,),
    observations=(
        first_of("update_rms", _stale_finding, _rms),
        gradient_growth,
        optimizer_share,
        rate,
        transient_loss,
        batch_values,
        split_of_jump(frozenset({Group.OPTIMIZER})),
    ),
    summary=_summary,
    fixes=_fixes,
    sufficient_findings=frozenset({("optimizer", "second_moment_stale")}),
)
