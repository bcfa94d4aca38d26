"""`adam_epsilon_too_small`.

V_t near zero and eps smaller still: noise is turned into full-size updates, or 0 / 0 into NaN.

Seen by: an epsilon that was changed to (nearly) nothing just before (finding `settings_changed`), or has been so all
along; gradients far below their usual size while the update is as large as ever; non-finite updates while gradients and
batch are finite; a replay that gives the damage to epsilon.

Against it: an optimizer without epsilon; one of 1e-8 or more with gradients of their usual size.

Thresholds: libraries use 1e-8; a hundredth of the former value is no tuning; below 1e-12 it holds back nothing in
float32. Whether v is small against epsilon does not tell: 1e-8 is far
below v in any healthy run.

To do: eps 1e-6, or 1e-5 where gradients are that small; in half precision 1e-8 is 0.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.constants import GUARD, REACH
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.settings import (
    SETTING_LEVELS,
    SettingChange,
    changed_setting,
    setting_change,
)
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, finite, transient_loss
from lightning_spike.diagnosis.view import EpisodeView, Excess
from lightning_spike.experiments import FactorShare
from lightning_spike.records import Change, EpisodeKind, Family

USUAL_EPSILON: Final = 1e-8
"""Adam's own epsilon in every library (Kingma & Ba 2015)."""
ADVISED: Final = (1e-6, 1e-5)
"""What to use instead (mission.md: 1e-6 … 1e-5), the second where gradients have shown to be noise."""
LOWERED: Final = 0.01
"""Factor on epsilon from which it was lowered, and not merely tuned; engineering choice."""
USELESS_EPSILON: Final = 1e-12
"""An epsilon so small stops nothing in float32: the square of a gradient of that size is near the smallest that single
precision holds with all digits (1e-38 for 1e-19); engineering choice."""
HUGE_RMS: Final = 10.0
"""RMS of g / max(sqrt(v), eps), where 2.3 is bad (Wortsman et al. 2023), from which second moments have no hold on the
update at all."""
FADED: Final = 0.1
"""Factor on the usual gradient norm from which it has faded, so that the rest may be noise; engineering choice."""


@observer("none")
def has_epsilon(view: EpisodeView) -> Observation | None:
    """The premise: an optimizer with an epsilon."""
    if view.setting("eps") is not None or not view.facts.optimizers:
        return None
    return Observation(level="none", text="The optimizer has no epsilon.", signal="eps")


@observer(*SETTING_LEVELS)
def _lowered_epsilon(view: EpisodeView) -> Observation | None:
    change = view.once(_lowered)
    return None if change is None else setting_change(view, change)


@observer("zero", "useless", "usual", "small")
def _epsilon(view: EpisodeView) -> Observation | None:
    eps = view.setting("eps")
    if eps is None:
        return None
    if eps <= 0.0:
        level, text = "zero", "There is no epsilon: it is 0."
    elif eps <= USELESS_EPSILON:
        level, text = "useless", f"Epsilon is {eps:.3g}, which holds nothing back in float32."
    else:
        level = "usual" if eps >= USUAL_EPSILON else "small"
        text = f"Epsilon is {eps:.3g}, and was not changed while training ran."
    return Observation(level=level, text=text, signal="eps", observed=eps, expected=USUAL_EPSILON)


@observer("non-finite update")
def nonfinite_update(view: EpisodeView) -> Observation | None:
    """NaN out of finite gradients and a finite batch: 0 / 0 in the update."""
    if view.kind is not EpisodeKind.NONFINITE or not _epsilon_now(view) < USUAL_EPSILON:
        return None
    gradient = view.latest("grad_norm", view.onset - 1)
    if gradient is None or not math.isfinite(gradient[1]) or view.onset - gradient[0] > GUARD:
        return None
    text = f"The gradients of the update before were finite (norm {gradient[1]:.3g}), the loss after it was not."
    return Observation(level="non-finite update", text=text, signal="grad_norm", step=view.step, observed=gradient[1])


@observer("full size")
def update_size(view: EpisodeView) -> Observation | None:
    """Gradients far below their usual size that make an update as large as any."""
    rms, faded = view.latest("update_rms", view.onset), view.once(_faded)
    if rms is None or view.onset - rms[0] > REACH or not _epsilon_now(view) < USUAL_EPSILON or faded is None:
        return None
    if not rms[1] >= HUGE_RMS and math.isfinite(rms[1]):
        return None
    text = (
        f"The gradient norm was {faded.observed:.3g} (usually {faded.expected:.3g}), yet the update was "
        f"×{rms[1]:.3g} what second moments and epsilon expect."
    )
    return Observation(
        level="full size", text=text, signal="update_rms", step=view.step, observed=finite(rms[1]), expected=1.0
    )


@observer("epsilon", "partly epsilon", "state", "not the state")
def epsilon_share(view: EpisodeView) -> Observation | None:
    """The share of the damage that replay gives to epsilon.

    A setting that was changed counts as a change from outside there, which says nothing.
    """
    if view.experiments is None:
        return None
    text = sentences.jump(view.experiments)
    of_eps = view.once(_epsilon_factor)
    if of_eps is not None:
        level = "epsilon" if of_eps.share >= judgement.CONFIRMING_SHARE else "partly epsilon"
        return Observation(level=level, text=text, signal="lab/attribution", step=view.step, observed=of_eps.share)
    if not view.shares or view.once(_lowered) is not None:
        return None
    share = view.shares.get(Group.OPTIMIZER, 0.0)
    level = "state" if share >= judgement.CONFIRMING_SHARE else "not the state"
    return Observation(level=level, text=text, signal="lab/attribution", step=view.step, observed=share)


@observer(*batch_values.levels, name="batch_values")
def batch(view: EpisodeView) -> Observation | None:
    """The values of the batch; asked only where no setting was changed."""
    return batch_values(view) if view.once(_lowered) is None else None


def _epsilon_factor(view: EpisodeView) -> FactorShare | None:
    attribution = None if view.experiments is None else view.experiments.attribution
    shares = () if attribution is None else (*attribution.finer, *attribution.shares)
    return next((s for s in shares if s.factor == "epsilon"), None)


def _lowered(view: EpisodeView) -> SettingChange | None:
    return changed_setting(view, _is_lowered, "eps")


def _is_lowered(change: SettingChange) -> bool:
    return change.after < min(LOWERED * change.before, USUAL_EPSILON)


def _epsilon_now(view: EpisodeView) -> float:
    change, eps = view.once(_lowered), view.setting("eps")
    if change is not None:
        return change.after
    return math.inf if eps is None else eps


def _faded(view: EpisodeView) -> Excess | None:
    """The lowest gradient norm just before the onset, where it has faded."""
    found = [e for at in range(view.onset - GUARD, view.onset) if (e := view.excess("grad_norm", at)) is not None]
    return min((e for e in found if 0.0 <= e.observed < FADED * e.expected), key=lambda e: e.observed, default=None)


def _summary(view: EpisodeView) -> str:
    change = view.once(_lowered)
    then = f", and {view.loss_text}" if view.store.episodes else ""
    if change is not None:
        return f"{change.text}, so that noise makes updates of full size and 0 / 0 is NaN{then}."
    return f"Adam's epsilon of {_epsilon_now(view):.3g} holds nothing back{then}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    change, now = view.once(_lowered), _epsilon_now(view)
    value = ADVISED[1] if now > 0.0 and view.once(_faded) is not None else ADVISED[0]
    find = "Keep epsilon and second moments in float32: in half precision 1e-8 is 0."
    if change is not None:
        find = (
            f"Find what set eps to {change.after:.3g} at step {change.step}: "
            "a cast of the settings to half precision makes 1e-8 a 0."
        )
    return (
        Fix(
            f"Use eps={value:g} in place of {now:.3g}: large enough to hold back updates made of noise, "
            "far below the roots of healthy second moments.",
            Change(setting="eps", value=value),
        ),
        Fix(find),
    )


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
        batch,
        split_of_jump(frozenset({Group.OPTIMIZER})),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({"numerical_instability", "stale_second_moment"}),
    sufficient_findings=frozenset({("optimizer", "settings_changed")}),
)
