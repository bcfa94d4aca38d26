"""`adam_epsilon_too_small`.

V_t is near zero and eps smaller still: noise becomes full-size updates, or 0 / 0 gives NaN.

Seen by: an epsilon that changed to (nearly) nothing just before (finding `settings_changed`), or was so all along;
gradients far below their usual size while the update is as large as ever; non-finite updates from finite gradients and
batch; a replay that gives the damage to epsilon.

Against it: an optimizer without epsilon; one of 1e-8 or more with gradients of their usual size.

Thresholds: libraries use 1e-8; a hundredth of the former value is no tuning; below 1e-12 it has no effect in float32.
Whether v is small against epsilon decides nothing: 1e-8 is far below v in any healthy run.

To do: eps 1e-6, or 1e-5 where gradients are that small; in half precision 1e-8 is 0.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import GUARD, REACH
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if, premise
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.settings import (
    SETTING_LEVELS,
    SettingChange,
    changed_setting,
    setting_change,
)
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, finite, gradient_norms, transient_loss
from lightning_spike.diagnosis.view import EpisodeView, Excess
from lightning_spike.records import Change, EpisodeKind, Family

USUAL_EPSILON: Final = 1e-8
"""Adam's own epsilon in every library (Kingma & Ba 2015)."""
ADVISED: Final = (1e-6, 1e-5)
"""What to use instead (1e-6 to 1e-5; engineering choice), the second where gradients are only noise."""
LOWERED_FACTOR: Final = 0.01
"""Factor on epsilon below which it was lowered, and not merely tuned; engineering choice."""
USELESS_EPSILON: Final = 1e-12
"""Epsilon up to which it has no effect in float32: the square of a gradient of 1e-19 is near the smallest normal number
(1e-38); engineering choice."""
HUGE_RMS: Final = 10.0
"""RMS of g / max(sqrt(v), eps) from which second moments do not limit the update; 2.3 is bad (Wortsman et al. 2023)."""
FADED_FACTOR: Final = 0.1
"""Factor on the usual gradient norm below which the rest may be noise; engineering choice."""


has_epsilon = premise(
    "has_epsilon", lambda view: view.setting("eps") is not None or not view.facts.optimizers, "none",
    "The optimizer has no epsilon.", signal="eps", step=None,
)  # fmt: skip
"""The premise: an optimizer with an epsilon."""


@observer(*SETTING_LEVELS)
def _lowered_epsilon(view: EpisodeView) -> Observation | None:
    change = view.once(_lowered)
    return None if change is None else setting_change(view, change)


@observer("zero", "useless", "usual", "small", signal="eps")
def _epsilon(view: EpisodeView) -> Observation | None:
    eps = view.setting("eps")
    if eps is None:
        return None
    level = "usual" if eps >= USUAL_EPSILON else "small"
    text = f"Epsilon is {eps:.3g} and did not change during training."
    if eps <= USELESS_EPSILON:
        level = "useless" if eps > 0.0 else "zero"
        text = f"Epsilon is {eps:.3g}: it has no effect in float32."
    return Observation(text, level=level, step=None, observed=eps, expected=USUAL_EPSILON)


@observer("non-finite update", signal="grad_norm")
def nonfinite_update(view: EpisodeView) -> Observation | None:
    """A non-finite loss after finite gradients and a finite batch: 0 / 0 in the update."""
    if view.kind is not EpisodeKind.NONFINITE or not _epsilon_now(view) < USUAL_EPSILON:
        return None
    gradient = view.latest("grad_norm", view.onset - 1)
    if gradient is None or not math.isfinite(gradient[1]) or view.onset - gradient[0] > GUARD:
        return None
    text = f"The gradients of the update before were finite (norm {gradient[1]:.3g}), the loss after it was not."
    return Observation(text, observed=gradient[1])


@observer("full size", signal="update_rms")
def update_size(view: EpisodeView) -> Observation | None:
    """Gradients far below their usual size with an update as large as ever."""
    rms, faded = view.latest("update_rms", view.onset), view.once(_faded)
    if rms is None or view.onset - rms[0] > REACH or not _epsilon_now(view) < USUAL_EPSILON or faded is None:
        return None
    if not rms[1] >= HUGE_RMS and math.isfinite(rms[1]):
        return None
    norm = f"{faded.observed:.3g} (usually {faded.expected:.3g})"
    size = sentences.times(rms[1])
    text = f"The gradient norm was {norm}, yet the update was {size} what second moments and epsilon allow."
    return Observation(text, observed=finite(rms[1]), expected=1.0)


@observer("epsilon", "partly epsilon", "state", "not the state", signal="lab/attribution")
def epsilon_share(view: EpisodeView) -> Observation | None:
    """The share of the damage that replay gives to epsilon, or to the optimizer's state where epsilon was not tested.

    A changed setting counts as an outside change in the replay, so it is no evidence then.
    """
    share, levels = view.once(_share_of_epsilon), ("epsilon", "partly epsilon")
    if share is None:
        if not view.shares or view.once(_lowered) is not None:
            return None
        share, levels = view.shares.get(Group.OPTIMIZER, 0.0), ("state", "not the state")
    level = levels[0] if share >= judgement.CONFIRMING_SHARE else levels[1]
    return Observation(sentences.jump(view.experiments), level=level, observed=share)


def _share_of_epsilon(view: EpisodeView) -> float | None:
    attribution = view.experiments.attribution
    shares = () if attribution is None else (*attribution.finer, *attribution.shares)
    return next((s.share for s in shares if s.factor == "epsilon"), None)


def _lowered(view: EpisodeView) -> SettingChange | None:
    return changed_setting(view, _is_lowered, "eps")


def _is_lowered(change: SettingChange) -> bool:
    return change.after < min(LOWERED_FACTOR * change.before, USUAL_EPSILON)


def _epsilon_now(view: EpisodeView) -> float:
    change, eps = view.once(_lowered), view.setting("eps")
    if change is not None:
        return change.after
    return math.inf if eps is None else eps


def _faded(view: EpisodeView) -> Excess | None:
    """The lowest gradient norm just before the onset, if far below the usual; else `None`."""
    found = gradient_norms(view, view.onset - GUARD, view.onset - 1)
    faded = (e for e in found if 0.0 <= e.observed < FADED_FACTOR * e.expected)
    return min(faded, key=lambda e: e.observed, default=None)


def _summary(view: EpisodeView) -> str:
    change = view.once(_lowered)
    if change is not None:
        return f"{change.text}, so that noise makes full-size updates{view.consequence}."
    return f"Adam's epsilon of {_epsilon_now(view):.3g} has no effect{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    change, now = view.once(_lowered), _epsilon_now(view)
    value = ADVISED[1] if now > 0.0 and view.once(_faded) is not None else ADVISED[0]
    find = "Keep epsilon and second moments in float32: in half precision 1e-8 is 0."
    if change is not None:
        half = "a cast of the settings to half precision makes 1e-8 a 0"
        find = f"Find what set eps to {change.after:.3g} at step {change.step}: {half}."
    why = "it limits updates from noise, and is far below healthy second moments"
    use = f"Use eps={value:g} in place of {now:.3g}: {why}."
    return (Fix(use, Change(setting="eps", value=value)), Fix(find))


CAUSE: Final = Cause(
    id="adam_epsilon_too_small",
    family=Family.OPTIMIZER,
    title="Adam's epsilon is too small",
    meaning="v_t is near zero and eps smaller still: noise becomes full-size updates",
    requires=(has_epsilon,),
    observations=(
        first_of("epsilon", _lowered_epsilon, _epsilon),
        nonfinite_update,
        update_size,
        epsilon_share,
        transient_loss,
        only_if(lambda view: view.once(_lowered) is None, batch_values),
        split_of_jump(frozenset({Group.OPTIMIZER})),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({"numerical_instability", "stale_second_moment"}),
    sufficient_findings=frozenset({("optimizer", "settings_changed")}),
)
