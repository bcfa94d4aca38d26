"""`gradient_vanishing`.

Gradients die out through depth: too many sigmoids in a row, without normalisation or residuals.

Seen by: the finding `vanished`: gradient norms of some layers have fallen to a fraction of their own past, far more
than those of others, while the loss is no lower; by experiment, that with the weights and batches of before the
gradient now falls off a hundred times as much from one module to an earlier one.

Against it: gradients in their range; damage that came with a long step, an odd batch or outside writes. Units that went
flat first are its cause.

Thresholds: see `detectors.layer_falls`; a thousandth is AUTOTRAINER's.

To do: norm layers or residual connections around the layers that get no gradient; ReLU or GELU in place of sigmoids; He
or Xavier initialisation.
"""

import math
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer
from lightning_spike.diagnosis.observations.experiments import gradient_fall
from lightning_spike.diagnosis.observations.shared_evidence import gradient_vanished_before
from lightning_spike.diagnosis.observations.upstream import UPSTREAM
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

BATCHES_AROUND: Final = 96
"""Batches around the onset in which the finding is looked for: it takes twice 16 rows, and up to 16 more to begin;
engineering choice."""
NOT_VANISHED: Final = 0.5
"""A gradient above this fraction of its usual norm has not vanished; engineering choice."""
STEEP_FALL: Final = 100.0
"""Times as much as before that the gradient falls off between two modules by experiment, from which layers in between
swallow it; engineering choice."""
FAR_FALL: Final = 1000.0
"""Times that the norm has fallen from which a layer learns nothing any more (AUTOTRAINER's ratio of the first layer and
the last)."""


@observer("steep")
def _fall_by_experiment(view: EpisodeView) -> Observation | None:
    """The fall of the gradient between two modules, measured where no finding says it."""
    fall = _steep_fall(view)
    if fall is None:
        return None
    early, late, factor = fall
    text = (
        f"With the weights and batches from before, the gradient falls off {sentences.times(factor)} as much "
        f"as it did from '{late}' back to '{early}'."
    )
    return Observation(level="steep", text=text, signal="lab/modules", step=view.step, observed=factor, expected=1.0)


@observer("far", "fallen", "none")
def _fallen_norms(view: EpisodeView) -> Observation | None:
    found = view.once(_finding)
    if found is None:
        if not any(name.split("/")[0] == "grad_norm" for name in view.store.layers):
            return None
        return Observation(level="none", text="No layer has lost its gradient.", signal="grad_norm", step=view.step)
    factor = _factor(found)
    return Observation(
        level="far" if factor is not None and factor >= FAR_FALL else "fallen", text=found.text, signal="grad_norm",
        step=found.at.step, observed=found.number("now"), expected=found.number("before"),
    )  # fmt: skip


@observer("stalled")
def stalled_loss(view: EpisodeView) -> Observation | None:
    """A loss that stands still."""
    is_stall = view.kind is EpisodeKind.STALL and view.episode.loss_before is not None
    if view.once(_finding) is None or not is_stall:
        return None
    return Observation(level="stalled", text="The loss stands still.", signal=view.episode.signal, step=view.step)


@observer("vanished")
def total_norm(view: EpisodeView) -> Observation | None:
    """The total gradient norm just before the onset."""
    return None if view.once(_finding) is None else gradient_vanished_before(view)


@observer("later")
def vanished_after_jump(view: EpisodeView) -> Observation | None:
    """The gradients were in their range when the loss had jumped: they vanished by what the jump did to the weights."""
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
    text = (
        f"When the loss had jumped, the gradient of {names[0]} was in its range ({min(norms):.3g}): it vanished later."
    )
    return Observation(
        level="later", text=text, signal="grad_norm", step=view.step, observed=min(norms), expected=before
    )


def _if_vanished(one: Observer) -> Observer:
    """What lies upstream is asked only where gradients have vanished."""

    def observe(view: EpisodeView) -> Observation | None:
        return None if view.once(_finding) is None and _steep_fall(view) is None else one(view)

    return Observer(one.name, one.levels, observe)


def _finding(view: EpisodeView) -> Finding | None:
    first, last = view.onset - BATCHES_AROUND, max(view.last, view.onset + BATCHES_AROUND)
    return next(iter(view.findings("gradients", "vanished", first=first, last=last)), None)


def _steep_fall(view: EpisodeView) -> tuple[str, str, float] | None:
    fall = gradient_fall(view)
    return fall if view.once(_finding) is None and fall is not None and fall[2] >= STEEP_FALL else None


def _worst(view: EpisodeView) -> str:
    """The module that has lost most of its gradient."""
    fall, found = _steep_fall(view), view.once(_finding)
    if fall is not None:
        return fall[0]
    names = () if found is None else found.names()
    return (names[0].rpartition(".")[0] or names[0]) if names else ""


def _factor(found: Finding) -> float | None:
    """By what factor the worst norm has fallen; infinite where it is 0."""
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
    what = f"By step {found.at.step} the gradients of {many} had all but vanished, most in {worst} ({fall})"
    if view.episode.loss_peak is None:
        return f"{what}; the loss does not show it."
    return f"{what}; {view.loss_text}."


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
        *(_if_vanished(one) for one in UPSTREAM),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    sufficient_findings=frozenset({("gradients", "vanished")}),
)
