"""`momentum_reversal`: the accumulated momentum points against the present gradient.

Seen by: a momentum that was changed to nearly 1 just before (finding `settings_changed`); a cosine between momentum and
gradient below -0.3 and below nearly all of the run's own, just before the loss rose; a step that went up the gradients
of the batches before; a replay that gives the damage to the momentum.

Against it: an optimizer without momentum; a cosine in its range; a replay that clears the optimizer's state, or one
after a gradient that exploded, which is then in the state. Gradients that point up their own loss are
`gradient_reversal`.

Thresholds: science.md 2.3. The cosine is measured every tenth update, so that a short turn can pass between two looks;
a missing one weighs little then.

To do: a lower momentum, or an empty one from before the turn; lower the rate or clip where gradients turn often.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import NEAR, REACH, REFERENCE
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if, premise
from lightning_spike.diagnosis.observations.experiments import finer_shares, split_of_jump
from lightning_spike.diagnosis.observations.gradient_in_state import exploded_gradient_in_state
from lightning_spike.diagnosis.observations.settings import (
    SETTING_LEVELS,
    SettingChange,
    changed_setting,
    setting_change,
)
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, transient_loss
from lightning_spike.diagnosis.observations.upstream import rate_upstream
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family

HIGH_MOMENTUM: Final = 0.99
"""Momentum from which weights run on for a hundred updates, 1 / (1 - beta); usual are 0.9 to 0.95;
engineering choice."""
USUAL_MOMENTUM: Final = 0.9
"""Momentum of nearly all recipes (Kingma & Ba 2015)."""
LONGER_MEMORY: Final = 2.0
"""Factor on the memory 1 / (1 - beta) from which a momentum was raised, and not merely tuned; engineering choice."""
OPPOSED_COSINE: Final = -0.3
"""Cosine between gradient and momentum below which they oppose each other (science.md 2.3)."""
MIN_COSINES: Final = 8
"""Healthy cosines without which none is unusual; engineering choice."""
RARE_QUANTILE: Final = 0.02
"""Quantile of the healthy cosines below which one is unusual: near a minimum the cosine scatters about 0;
engineering choice."""
SHOWS_WITHIN: Final = 64
"""Batches in which a raised momentum shows: it builds up over its memory of a hundred updates; engineering choice."""


has_momentum = premise(
    "has_momentum", lambda view: _momentum(view) is not None or not view.facts.optimizers, "none",
    "The optimizer has no momentum.", signal="momentum", step=None,
)  # fmt: skip
"""The premise: an optimizer with momentum."""


@observer(*SETTING_LEVELS)
def _raised_momentum(view: EpisodeView) -> Observation | None:
    change = view.once(_raised)
    return None if change is None else setting_change(view, change, soon=SHOWS_WITHIN)


@observer("high", signal="momentum")
def _high_momentum(view: EpisodeView) -> Observation | None:
    momentum = _momentum(view)
    if momentum is None or momentum < HIGH_MOMENTUM:
        return None
    text = f"The momentum is {momentum:.4g}: the weights run on for {1.0 / (1.0 - momentum):.0f} updates."
    return Observation(text, step=None, observed=momentum, expected=USUAL_MOMENTUM)


@observer("opposed", "in range", "unknown", signal="momentum_cosine")
def cosine(view: EpisodeView) -> Observation | None:
    """The lowest cosine of momentum and gradient just before the onset against those of healthy batches."""
    found = view.once(_cosine)
    by_setting = view.once(_raised) is not None or _by_gradient(view)
    return None if by_setting and found.level != "opposed" else found


def _cosine(view: EpisodeView) -> Observation:
    usual = view.before("momentum_cosine", REFERENCE)
    near = view.store.history.between("momentum_cosine", view.onset - REACH, view.onset)
    near = near[np.isfinite(near)]
    if usual.size < MIN_COSINES or near.size == 0:
        return Observation("Nothing shows that the momentum turned.", level="unknown")
    lowest, middle = float(near.min()), float(np.median(usual))
    is_odd = lowest < OPPOSED_COSINE and lowest < float(np.quantile(usual, RARE_QUANTILE))
    text = f"The cosine between momentum and gradient was {lowest:.2g} just before, usually {middle:.2g}."
    return Observation(text, level="opposed" if is_odd else "in range", observed=lowest, expected=middle)


@observer("wrong_direction", "too_long", "ordinary", signal="lab/update")
def direction(view: EpisodeView) -> Observation | None:
    """Whether the damaging step went down or up the gradients of the batches before."""
    update = view.experiments.update
    if update is None:
        return None
    level = judgement.update_direction(update)
    return Observation(sentences.update(update), level=level, observed=update.against)


@observer(
    "exploded gradient in state", "momentum", "state", "state of the located update",
    "steps, momentum raised", "undecided", "refuted", signal="lab/attribution",
)  # fmt: skip
def state_share(view: EpisodeView) -> Observation | None:
    """The share of the jump that replay gives to the optimizer's state.

    Where the momentum itself was changed, replay uses it as the baseline and finds long steps. Gradients that point the
    other way for a while look like chronically long steps; then the state's share of the located update refutes
    nothing. It shows little either, because too high a rate builds up momentum in the same way.
    """
    share = view.shares.get(Group.OPTIMIZER, 0.0)
    if not view.shares:
        return None
    return Observation(sentences.jump(view.experiments), level=_share_level(view, share), observed=share)


def _share_level(view: EpisodeView, share: float) -> str:
    raised = view.once(_raised) is not None
    if not raised and exploded_gradient_in_state(view) is not None:
        return "exploded gradient in state"
    if share >= judgement.CONFIRMING_SHARE:
        return "momentum" if _is_momentum(view) else "state"
    if not raised and _share_of_located_state(view) >= judgement.CONFIRMING_SHARE:
        return "state of the located update"
    if raised:
        by_steps = view.shares.get(Group.INTRINSIC, 0.0) >= judgement.CONFIRMING_SHARE
        return "steps, momentum raised" if by_steps else "undecided"
    return "undecided" if share > judgement.REFUTING_SHARE else "refuted"


def _by_gradient(view: EpisodeView) -> bool:
    return view.shares.get(Group.GRADIENT, 0.0) >= judgement.CONFIRMING_SHARE


def _share_of_located_state(view: EpisodeView) -> float:
    attribution = view.experiments.attribution
    shares = () if attribution is None else attribution.shares
    return sum(max(s.share, 0.0) for s in shares if s.group == Group.OPTIMIZER)


def _is_momentum(view: EpisodeView) -> bool:
    """Whether the finer experiment found the momentum, and not the second moments."""
    parts = finer_shares(view)
    if not parts:
        return view.beta2 is None
    return parts.get("momentum", 0.0) > max(parts.get("second_moments", 0.0), 0.0)


def _momentum(view: EpisodeView) -> float | None:
    """The first beta, or SGD's momentum; `None` where there is none."""
    for group in (group for optimizer in view.facts.optimizers for group in optimizer.groups):
        betas = group.get("betas")
        first = betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
        if isinstance(first, int | float) and 0.0 < first < 1.0:
            return float(first)
    return None


def _raised(view: EpisodeView) -> SettingChange | None:
    return changed_setting(view, _is_raised, "momentum", "betas")


def _is_not_raised(view: EpisodeView) -> bool:
    return view.once(_raised) is None


def _is_raised(change: SettingChange) -> bool:
    """Whether the momentum is now near 1, with a clearly longer memory 1 / (1 - beta)."""
    return change.after >= HIGH_MOMENTUM and 1.0 - change.before >= LONGER_MEMORY * (1.0 - change.after)


def _memory(momentum: float) -> str:
    return f"{1.0 / max(1.0 - momentum, 1e-12):.0f}"


def _summary(view: EpisodeView) -> str:
    change = view.once(_raised)
    if change is not None:
        what = change.text.replace("betas", "the first beta").replace("momentum of", "the momentum of")
        what = f"{what[:1].upper()}{what[1:]}"
        return f"{what}, so that weights run on for some {_memory(change.after)} updates{view.consequence}."
    found = view.once(_cosine)
    value = "" if found.observed is None else f" (cosine {found.observed:.2g})"
    return f"The momentum pointed against the gradient{value} just before step {view.step}{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    change, momentum = view.once(_raised), _momentum(view) or USUAL_MOMENTUM
    now, back = momentum, min(USUAL_MOMENTUM, momentum * momentum)
    second = f"Empty the momentum where gradients turn: within {NEAR} batches it is as old as the turn."
    if change is not None:
        now, back = change.after, change.before
        second = f"Find what set it at step {change.step}, and go on from a checkpoint from before."
    setting = f"momentum={back:.3g}" if view.beta2 is None else f"betas=({back:.3g}, …)"
    use = f"Use {setting} in place of {now:.4g}: its memory is {_memory(back)} updates in place of {_memory(now)}."
    return (Fix(use, Change(setting="momentum", value=back)), Fix(second))


CAUSE: Final = Cause(
    id="momentum_reversal",
    family=Family.OPTIMIZER,
    title="Momentum against the gradient",
    meaning="the accumulated momentum points against the present gradient",
    requires=(has_momentum,),
    observations=(
        first_of("momentum", _raised_momentum, _high_momentum),
        cosine,
        direction,
        state_share,
        transient_loss,
        only_if(_is_not_raised, batch_values),
        only_if(_is_not_raised, rate_upstream),
        split_of_jump(frozenset({Group.OPTIMIZER})),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    sufficient_findings=frozenset({("optimizer", "settings_changed")}),
)
