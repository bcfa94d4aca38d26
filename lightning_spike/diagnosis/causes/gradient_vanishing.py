"""`gradient_vanishing`: gradients die out through depth: too many sigmoids in a row, no normalisation or residuals.

Seen by: the finding `vanished`: gradient norms of some layers have fallen to a fraction of their own past, far more
than those of others, while the loss is no lower; by experiment, that with the old weights and batches the gradient now
falls off a hundred times as much from one module to an earlier one.

Against it: gradients in their range; damage after a long step, an odd batch or outside writes. Units that went flat
first are its cause.

Thresholds: see `detectors.layer_falls`; a thousandth is AUTOTRAINER's.

To do: norm layers or residual connections around the layers that get no gradient; ReLU or GELU in place of sigmoids; He
or Xavier initialisation.
"""

import math
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if
from lightning_spike.diagnosis.observations.experiments import gradient_fall
from lightning_spike.diagnosis.observations.shared_evidence import FAR_VANISHED_FACTOR, gradient_vanished_before
from lightning_spike.diagnosis.observations.upstream import UPSTREAM
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

BATCHES_AROUND: Final = 96
"""Batches around the onset in which the finding counts: it takes twice 16 rows, and up to 16 more to begin;
engineering choice."""
NOT_VANISHED: Final = 0.5
"""A gradient above this fraction of its usual norm has not vanished; engineering choice."""
STEEP_FALL: Final = 100.0
"""Factor by which the gradient falls off more between two modules from which layers in between block it;
engineering choice."""


@observer("steep", signal="lab/modules")
def _fall_by_experiment(view: EpisodeView) -> Observation | None:
    """The fall of the gradient between two modules, measured where no finding says it."""
    fall = _steep_fall(view)
    if fall is None:
        return None
    early, late, factor = fall
    text = (
        f"With the old weights and batches, the gradient now falls off {sentences.times(factor)} as much "
        f"from '{late}' back to '{early}'."
    )
    return Observation(text, observed=factor, expected=1.0)


@observer("far", "fallen", "none", signal="grad_norm")
def _fallen_norms(view: EpisodeView) -> Observation | None:
    found = view.once(_finding)
    if found is None:
        is_recorded = any(name.split("/")[0] == "grad_norm" for name in view.store.layers)
        return Observation("No layer has lost its gradient.", level="none") if is_recorded else None
    factor, now, before = _factor(found), found.number("now"), found.number("before")
    level = "far" if factor is not None and factor >= FAR_VANISHED_FACTOR else "fallen"
    return Observation(found.text, level=level, step=found.at.step, observed=now, expected=before)


@observer("stalled")
def stalled_loss(view: EpisodeView) -> Observation | None:
    """A loss that stopped falling."""
    is_stall = view.kind is EpisodeKind.STALL and view.episode.loss_before is not None
    return Observation("The loss stopped falling.") if is_stall and view.once(_finding) is not None else None


total_norm = only_if(lambda view: view.once(_finding) is not None, gradient_vanished_before, "total_norm")
"""The total gradient norm just before the onset."""


@observer("later", signal="grad_norm")
def vanished_after_jump(view: EpisodeView) -> Observation | None:
    """The gradients were in range when the loss had jumped: damage to the weights made them vanish later."""
    found = view.once(_finding)
    names, before = ((), None) if found is None else (found.names(), found.number("before"))
    layers = view.store.layer_names.get("grad_norm", ())
    if not names or names[0] not in layers or before is None or view.sudden is not True:
        return None
    place = layers.index(names[0])
    rows = view.store.layer_rows("grad_norm", view.onset, view.onset + 1)
    norms = [float(row.values[place]) for row in rows if len(row.values) == len(layers)]
    if not norms or not min(norms) >= NOT_VANISHED * before > 0.0:
        return None
    text = f"When the loss had jumped, the gradient of {names[0]} was still {min(norms):.3g}: it vanished later."
    return Observation(text, observed=min(norms), expected=before)


def _has_vanished(view: EpisodeView) -> bool:
    return view.once(_finding) is not None or _steep_fall(view) is not None


def _finding(view: EpisodeView) -> Finding | None:
    first, last = view.onset - BATCHES_AROUND, max(view.last, view.onset + BATCHES_AROUND)
    return next(iter(view.findings("gradients", "vanished", first=first, last=last)), None)


def _steep_fall(view: EpisodeView) -> tuple[str, str, float] | None:
    fall = gradient_fall(view)
    return fall if view.once(_finding) is None and fall is not None and fall[2] >= STEEP_FALL else None


def _worst(view: EpisodeView) -> str:
    """The module that has lost most of its gradient; empty where it is not known."""
    fall, found = _steep_fall(view), view.once(_finding)
    if fall is not None:
        return fall[0]
    names = () if found is None else found.names()
    return (names[0].rpartition(".")[0] or names[0]) if names else ""


def _factor(found: Finding) -> float | None:
    """Factor by which the worst norm has fallen; infinite where it is 0."""
    before, now = found.number("before"), found.number("now")
    if before is None or now is None or not before > 0.0 or now < 0.0:
        return None
    return before / now if now > before * 1e-300 else math.inf


def _summary(view: EpisodeView) -> str:
    found, worst = view.once(_finding), _worst(view)
    if found is None:
        where = f" on their way back to {worst}" if worst else ""
        return f"Gradients have vanished{where}, and {view.loss_text}."
    factor, count, of = _factor(found), found.number("count"), found.number("of")
    fall = "to nothing" if factor is None or not math.isfinite(factor) else f"by a factor of {factor:.3g}"
    many = "some parameters" if count is None or of is None else f"{count:.0f} of {of:.0f} parameters"
    then = "the loss does not show it" if view.episode.loss_peak is None else view.loss_text
    return f"By step {found.at.step} the gradients of {many} had vanished, most in {worst} ({fall}); {then}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    found, worst = view.once(_finding), _worst(view)
    where = f"around {worst}, which gets no gradient any more" if worst else "around the early layers"
    now, before = (None, None) if found is None else (found.number("now"), found.number("before"))
    norms = "" if now is None or before is None else f" ({now:.2g}, before {before:.2g})"
    change = Change(setting="normalization_layer", value=worst) if worst else None
    return (
        Fix(f"Put a norm layer or a residual connection {where}{norms}.", change),
        Fix("Use ReLU or GELU in place of sigmoid or tanh between the layers, with He or Xavier initialisation."),
    )


CAUSE: Final = Cause(
    id="gradient_vanishing",
    family=Family.GRADIENT,
    title="Vanishing gradients",
    meaning="gradients die out through depth; training stalls",
    observations=(
        first_of("layer_gradients", _fall_by_experiment, _fallen_norms),
        stalled_loss,
        total_norm,
        vanished_after_jump,
        *(only_if(_has_vanished, one) for one in UPSTREAM),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    sufficient_findings=frozenset({("gradients", "vanished")}),
)
