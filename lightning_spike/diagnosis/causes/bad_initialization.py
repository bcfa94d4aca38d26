"""`bad_initialization`: weights far too large or too small from the start.

Typical reasons: a standard deviation of 1 where a small one was meant, a wrong fan-in.

Seen by: the scale of the weights at the first batch against 1 / sqrt(fan-in); a first loss far above that of a uniform
guess; an episode in the first batches.

Against it: weights of a usual scale; an episode after training had gone well for long; a resumed run, whose weights are
not initial ones.

Thresholds: the usual initialisations lie between 0.1 and 2.4 of 1 / sqrt(fan-in) (torch's default 0.58, Xavier and He
up to 1.4, with the largest gain 2.4); 4 and 8 are beyond all of them. A uniform guess among n classes has loss log n.

To do: the layer's default initialisation, or the factor that gives its weights that scale.
"""

import dataclasses
import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.layers import layer_table
from lightning_spike.diagnosis.observations.shared_evidence import finite
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

USUAL_SCALE: Final = 0.58
"""Root mean square of torch's default weights over 1 / sqrt(fan-in): uniform in ±1 / sqrt(fan-in), by definition."""
EXTREME_SCALE: Final = 8.0
"""Scale over 1 / sqrt(fan-in) far beyond any usual initialisation; `WeightMonitor` finds them from 4 on;
engineering choice."""
EARLY_BATCHES: Final = 128
"""Batches in which the initial weights may show, as the loss is still falling; engineering choice."""
LATE_BATCHES: Final = 512
"""Batches after which they cannot, as updates have changed them; engineering choice."""
FIRST_LOSSES: Final = 4
"""Losses whose median is the first level; engineering choice."""
EXTREME_LOSS: Final = 2.0
"""Multiple of the loss of a uniform guess from which a first loss is extreme: sound nets begin at about 1;
engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InitialScale:
    """The weight with the most unusual initial scale."""

    name: str
    scale: float
    """Root mean square over 1 / sqrt(fan-in)."""


@observer("extreme", "unusual", "usual", "resumed", signal="initial_scale")
def initial_scale(view: EpisodeView) -> Observation | None:
    """The scale of the initial weights."""
    found, worst = view.once(_finding), view.once(_worst)
    if found is None:
        return _usual(view)
    scale = None if worst is None else worst.scale
    level = "extreme" if scale is not None and scale >= EXTREME_SCALE else "unusual"
    return Observation(found.text, level=level, step=found.at.step, observed=scale, expected=USUAL_SCALE)


def _usual(view: EpisodeView) -> Observation | None:
    if view.facts.resumed_from is not None or view.facts.first_step > 0:
        return Observation("The run was resumed, so its weights are not initial ones.", level="resumed", step=None)
    if not view.store.layer_names.get("initial_scale"):
        return None
    return Observation("The weights began at a usual scale.", level="usual", step=0)


@observer("extreme", "usual", signal="loss")
def first_loss(view: EpisodeView) -> Observation | None:
    """The first losses against that of a uniform guess, where targets are classes."""
    losses = view.store.history.between("loss", 0, FIRST_LOSSES - 1)
    classes = _classes(view)
    if view.once(_finding) is None or losses.size == 0 or classes is None or view.onset > LATE_BATCHES:
        return None
    known = losses[np.isfinite(losses)]
    first, guess = float(np.median(known)) if known.size else math.inf, math.log(classes)
    level = "extreme" if first > EXTREME_LOSS * guess else "usual"
    text = f"The first losses were {first:.3g}; a guess among the {classes} classes has {guess:.3g}."
    return Observation(text, level=level, step=0, observed=finite(first), expected=guess)


@observer("early", "late", signal="loss")
def onset_in_run(view: EpisodeView) -> Observation | None:
    """Whether the episode began while the initial weights could matter."""
    if view.once(_finding) is None or EARLY_BATCHES < view.onset <= LATE_BATCHES:
        return None
    if view.onset <= EARLY_BATCHES:
        return Observation(f"The episode began at step {view.step}, near the initial weights.", level="early")
    return Observation(f"The initial weights had changed over {view.onset} batches by then.", level="late")


def _finding(view: EpisodeView) -> Finding | None:
    return next(iter(view.findings("weights", "initial_scale", first=0, last=view.last)), None)


def _worst(view: EpisodeView) -> InitialScale | None:
    """The weight with the worst scale, by the recorded scales, or by the finding where they are no longer held."""
    found = view.once(_finding)
    if found is None:
        return None
    table = layer_table(view, "initial_scale", 0, found.at.ordinal)
    scales = table.values[0] if len(table.values) else np.zeros(0)
    if (scales > 0.0).any():
        sign = 1.0 if found.detail.get("direction") == "small" else -1.0
        place = int(np.where(scales > 0.0, sign * scales, np.inf).argmin())
        return InitialScale(name=table.names[place], scale=float(scales[place]))
    names, scale = found.names(), found.number("scale")
    return InitialScale(name=names[0], scale=scale) if names and scale is not None and scale > 0.0 else None


def _classes(view: EpisodeView) -> int | None:
    """The number of classes seen in the targets (counted modulo 64); `None` where targets are no classes."""
    signals = [s for s in view.store.layer_names if s.startswith("batch/") and s.endswith("/histogram")]
    seen = [layer_table(view, signal, 0, EARLY_BATCHES).values for signal in signals]
    counts = [int((np.nan_to_num(values) > 0.0).any(axis=0).sum()) for values in seen if values.size]
    return counts[0] if len(counts) == 1 and counts[0] > 1 else None


def _summary(view: EpisodeView) -> str:
    found, worst = view.once(_finding), view.once(_worst)
    if found is None or worst is None:
        return f"The weights began at an unusual scale, and {view.loss_text}."
    count, of = found.number("count"), found.number("of")
    many = "Weights" if count is None or of is None else f"{count:.0f} of {of:.0f} weights"
    first = view.store.history.between("loss", 0, 0)
    began = f"; the loss began at {first[0]:.3g}" if first.size and math.isfinite(first[0]) else ""
    what = "small" if found.detail.get("direction") == "small" else "large"
    return (
        f"{many} were far too {what} from the start, {worst.name} most: "
        f"{sentences.times(worst.scale)} of 1 / sqrt(fan-in), "
        f"usually {USUAL_SCALE:g} to 1.4{began}."
    )


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    worst = view.once(_worst)
    if worst is None:
        return (Fix("Initialise the layers as torch does by default: layer.reset_parameters()."),)
    factor = float(f"{USUAL_SCALE / worst.scale:.2g}") if worst.scale > 0.0 else 1.0
    scale = f"{sentences.times(worst.scale)} of 1 / sqrt(fan-in), torch's {USUAL_SCALE:g}"
    text = (
        f"Initialise {worst.name} as torch does by default (layer.reset_parameters()), or multiply its first values by "
        f"{factor:g}: they are {scale}. The same for the others."
    )
    change = Change(setting="initialization", value=worst.name)
    return Fix(text, change), Fix("A norm layer behind a layer makes its scale matter less.")


CAUSE: Final = Cause(
    id="bad_initialization",
    family=Family.NUMERICS,
    title="A bad initialisation",
    meaning="extreme from the first step, because of the initial weights",
    observations=(initial_scale, first_loss, onset_in_run),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset(
        {"lr_too_high", "warmup_too_short", "activation_saturation", "gradient_vanishing", "numerical_instability"}
    ),
    sufficient_findings=frozenset({("weights", "initial_scale")}),
)
