"""`weight_blowup`: weights grow, or shrink, by the same factor with every update until they are extreme.

Typical reasons: a wrong sign of the weight decay, or a decay far too strong.

Seen by: the norm of all weights, which grows geometrically from before the loss rose on, far faster than in this run's
healthy part; updates that lie along the weights themselves; a setting `weight_decay` that changed during training.

Against it: weights of their usual size; a growth that began after the loss rose (then it is damage); a loss that jumped
when the weights had hardly changed; a replay with the jump under the old weights too; updates across the weights, as
too long steps make them.

Thresholds: growth against the run's own rate of growth. A step that overshoots turns the weights rather than
lengthening them: its length is a multiple of what it adds to the norm, where a decay of the wrong sign adds all of it.

To do: restore the weight decay, or give it a usual value and the right sign.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.layers import shifted_most
from lightning_spike.diagnosis.observations.rates import climbed
from lightning_spike.diagnosis.observations.weight_growth import WeightGrowth, weight_growth
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

DOUBLED_FACTOR: Final = 2.0
"""Growth from which the weights have changed completely; engineering choice."""
UNCHANGED_FACTOR: Final = 1.2
"""Growth up to which the weights are as before; engineering choice."""
ALONG_SHARE: Final = 0.7
"""Share of an update along the weights from which it is their own growth: gradient steps lie mostly across them;
engineering choice."""
ACROSS_SHARE: Final = 0.3
"""Share up to which the updates are mostly something else; engineering choice."""
BEYOND_SHARE: Final = 2.0
"""Share from which the updates cannot have made the growth; engineering choice."""
DEFAULT_DECAY: Final = {"AdamW": 0.01}
"""torch's own weight decay; 1e-4 for the others (He et al. 2016)."""
USUAL_DECAY: Final = 1e-4
"""Weight decay of most recipes (He et al. 2016)."""
SLOW: Final = frozenset({EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION, EpisodeKind.STALL})
"""Kinds of episode whose onset is dated back."""


@observer("doubled", "grew", "uneven", "uneven, decay changed", "in range", signal="weight_norm")
def weight_norm(view: EpisodeView) -> Observation | None:
    """The growth of the norm; an uneven one shows little, unless the decay changed: then steps may add to it."""
    growth = view.once(weight_growth)
    if growth is None:
        return None
    before, after = growth.before, growth.after
    if growth.rate == 0.0 or growth.factor < UNCHANGED_FACTOR:
        text = f"The norm of all weights went from {before:.3g} to {after:.3g}, as in ordinary training."
        return Observation(text, level="in range", observed=after, expected=before)
    what = "grew" if growth.rate >= 0.0 else "shrank"
    text = (
        f"The norm of all weights {what} from {before:.3g} (step {view.step_of(growth.first)}) to "
        f"{after:.3g} (step {view.step_of(growth.last)}), {sentences.times(math.exp(growth.rate))} with every update."
    )
    return Observation(text, level=_growth_level(view, growth), observed=after, expected=before)


def _growth_level(view: EpisodeView, growth: WeightGrowth) -> str:
    if growth.steady:
        return "doubled" if growth.factor >= DOUBLED_FACTOR else "grew"
    return "uneven" if view.once(_decay_change) is None else "uneven, decay changed"


@observer("along the weights", "across the weights", "not by updates", signal="update_norm")
def updates(view: EpisodeView) -> Observation | None:
    """The share of the updates' length that goes into the size of the weights."""
    growth = view.once(weight_growth)
    share = None if growth is None or not growth.steady else growth.along
    if share is None or ACROSS_SHARE < share < ALONG_SHARE:
        return None
    if share > BEYOND_SHARE:
        text = f"The weights changed {sentences.times(share)} as fast as the updates account for."
        return Observation(text, level="not by updates", observed=share)
    level = "along the weights" if share >= ALONG_SHARE else "across the weights"
    text = f"{100.0 * min(share, 1.0):.0f} % of the updates' length goes into the size of the weights."
    return Observation(text, level=level, observed=share)


@observer("before the loss", "after the loss", signal="weight_norm")
def start(view: EpisodeView) -> Observation | None:
    """Whether the growth was there before the loss rose; a slow episode is dated back."""
    growth = view.once(weight_growth)
    if growth is None or growth.rate == 0.0:
        return None
    late = growth.shown > view.onset + (GUARD if view.kind in SLOW else 0)
    level = "after the loss" if late else "before the loss"
    text = f"The growth began {level} rose, between steps {view.step_of(growth.first)} and {view.step_of(growth.last)}."
    return Observation(text, level=level)


@observer("unchanged", signal="weight_norm")
def weights_at_jump(view: EpisodeView) -> Observation | None:
    """A loss that jumps from one batch to the next while the weights had hardly grown."""
    growth = view.once(weight_growth)
    if growth is None or growth.rate == 0.0 or view.sudden is not True:
        return None
    factor = growth.factor_by(view.onset)
    text = f"When the loss jumped, the norm of all weights was at most {sentences.times(factor)} its earlier value."
    return Observation(text, observed=factor, expected=1.0) if factor < UNCHANGED_FACTOR else None


@observer("changed", signal="lab/split")
def computation(view: EpisodeView) -> Observation | None:
    """Control batches have the high loss under the old weights too, so the cause is not in the weights."""
    share = view.shares.get(Group.COMPUTATION, 0.0)
    return (
        Observation(sentences.jump(view.experiments), observed=share) if share >= judgement.CONFIRMING_SHARE else None
    )


@observer("climb")
def rate(view: EpisodeView) -> Observation | None:
    """A climbing rate, which makes every update longer."""
    climb = climbed(view)
    if climb is None:
        return None
    text = f"{climb.text}, which lengthens every update."
    return Observation(text, signal=climb.signal, observed=climb.now, expected=climb.usual)


@observer("changed", signal="weight_decay")
def weight_decay(view: EpisodeView) -> Observation | None:
    """A weight decay that changed during training."""
    found = view.once(_decay_change)
    if found is None:
        return None
    after, before = found.number("after"), found.number("before")
    return Observation(found.text, step=found.at.step, observed=after, expected=before)


def _decay_change(view: EpisodeView) -> Finding | None:
    """The last change of a weight decay up to the onset."""
    found = view.findings("optimizer", "settings_changed", first=0, last=view.onset)
    return next((f for f in reversed(found) if f.detail.get("name") == "weight_decay"), None)


def _summary(view: EpisodeView) -> str:
    growth = view.once(weight_growth)
    if growth is None or growth.rate == 0.0:
        return f"The weights became extreme, and {view.loss_text}."
    most = shifted_most(view, "weight_max", growth.first, growth.last, down=growth.rate < 0.0)
    where, each = "", f"multiplied by {math.exp(growth.rate):.3g} with every update"
    if most is not None:
        where = f" (most in {most.name}: largest value {most.observed:.3g}, usually {most.expected:.3g})"
    weights = f"From step {view.step_of(growth.first)} on the weights were {each}"
    return f"{weights}, to {sentences.times(growth.factor)} their size{where}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    growth = view.once(weight_growth)
    each = ""
    if growth is not None and growth.rate != 0.0:
        each = f": the weights are now multiplied by {math.exp(growth.rate):.3g} with every update"
    text, value = _decay_text(view)
    return (
        Fix(f"{text}{each}.", Change(setting="weight_decay", value=value)),
        Fix("Weight decay that is decoupled from the gradient (AdamW) acts as it is set, whatever the gradients."),
    )


def _decay_text(view: EpisodeView) -> tuple[str, float]:
    found = view.once(_decay_change)
    was, now = (None, None) if found is None else (found.number("before"), found.number("after"))
    if found is not None and was is not None and now is not None:
        return f"Set the weight decay of {found.detail.get('optimizer')} back from {now:.3g} to {was:g}", was
    name = next((o.class_name for o in view.facts.optimizers), "")
    value, present = DEFAULT_DECAY.get(name, USUAL_DECAY), view.setting("weight_decay")
    if present is not None and math.isclose(present, value):
        return f"Find what scales the weights, or changes the decay; the weight decay of {present:g} is usual", value
    begin = "Set the weight decay" if present is None else f"Set the weight decay from {present:g}"
    return f"{begin} to {value:g}, a usual value, and find whatever else scales the weights", value


CAUSE: Final = Cause(
    id="weight_blowup",
    family=Family.NUMERICS,
    title="Weights that blow up or wither",
    meaning="weights have grown (or shrunk) to extreme values over the run",
    observations=(weight_norm, updates, start, weights_at_jump, computation, rate, weight_decay),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({
        "lr_too_high", "numerical_instability", "activation_saturation", "gradient_vanishing", "bad_batch",
        "label_noise", "hard_sample_streak",
    }),
)  # fmt: skip
