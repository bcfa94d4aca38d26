"""`activation_saturation`: dead ReLUs, saturated sigmoid or tanh.

Typical reasons: a bias that ran away, inputs of a layer in other units, a removed normalisation.

Seen by: the share of a layer's outputs in the flat part of its activation, against the layer's own past, as half of a
healthy ReLU's outputs are 0. The gradients of the layers before vanish with it, and the loss jumps from one batch to
the next after ordinary updates.

Against it: layers as alive as before, also after the loss had risen; outputs that grew as a whole although most of them
are 0 (dropout); whatever may have damaged the weights first: an event of the rate, an odd batch, outside writes.

Thresholds: a quarter of the active outputs is left, and 80 % are flat (TheDeepChecker: 85 % saturated, or half of the
units dead).

To do: a norm layer before the activation, or an activation that is not flat; the usual initialisation and a lower rate
where steps killed the units.
"""

from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer, only_if
from lightning_spike.diagnosis.observations.experiments import computation_changed, grown_module
from lightning_spike.diagnosis.observations.flat_units import (
    BATCHES_AFTER,
    BATCHES_BEFORE,
    FlatUnits,
    first_flat,
    flattest_layer,
    rms_growth,
    share_after_onset,
)
from lightning_spike.diagnosis.observations.upstream import UPSTREAM
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

LOUDER_FACTOR: Final = 2.0
"""Factor on the size of a layer's outputs from which it is clearly louder than before; engineering choice."""
MAX_FLAT_BEFORE: Final = 0.02
"""Flat share up to which a layer had practically no flat outputs; engineering choice."""
MIN_GROWTH: Final = 0.2
"""Growth of the flat share from which a layer has changed at all; engineering choice."""
MIN_GROWTH_RECURRENT: Final = 0.1
"""The same for a recurrent layer, whose output is a product with a gate; engineering choice."""
STILL_ALIVE_SHARE: Final = 0.5
"""Part of the growth of the flat share below which a layer was still alive; engineering choice."""
UNTOUCHED_SHARE: Final = 0.1
"""Part of the growth of the flat share below which a layer was untouched; engineering choice."""
SILENT_FACTOR: Final = 0.5
"""Factor on an activation's outputs in an ordinary batch below which its units have practically stopped;
engineering choice."""
DROPOUT_GROWTH: Final = 1.25
"""Factor on the size of a layer's outputs, and of those behind it, from which zeros are dropout: dropout scales the
rest up by 1 / (1 - p), dead units do not; engineering choice."""
RECURRENT: Final = frozenset({"RNN", "GRU", "LSTM"})
ACTIVATIONS: Final = frozenset({
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Softplus", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh",
})  # fmt: skip
"""Classes of torch whose outputs are flat somewhere."""


@observer("silent", signal="lab/modules")
def _silent_by_experiment(view: EpisodeView) -> Observation | None:
    """With the old weights and batches, an activation gives next to nothing, and it is the first changed module."""
    silent, measured = view.once(_silent), view.experiments.modules
    if silent is None or measured is None:
        return None
    text = f"{sentences.modules(measured)} Its inputs are in their usual range."
    return Observation(text, observed=silent[1], expected=1.0)


@observer("dropout", signal="activation_rms")
def _dropout(view: EpisodeView) -> Observation | None:
    """Zeros in outputs that are larger as a whole: dropout, to which the model adapts later."""
    flat = view.once(flattest_layer)
    if flat is None or flat.kind != "dead" or flat.grown < MIN_GROWTH:
        return None
    at = first_flat(view, flat)
    growth = rms_growth(view, flat.name, at, layers=2)
    if growth is None or not growth[0] >= DROPOUT_GROWTH:
        return None
    (_, size, usual), step = growth, view.step_of(at)
    grew = f"their size grew from {usual:.3g} to {size:.3g}"
    text = f"Most outputs of {flat.name} are 0 at step {step}, but {grew}, as with dropout."
    return Observation(text, step=step, observed=size, expected=usual)


@observer("nearly all", "new", "more", "alive", "finding alone")
def _flat_share(view: EpisodeView) -> Observation | None:
    """The share of flat outputs in the flattest layer."""
    flat, found = view.once(flattest_layer), view.once(_finding)
    if flat is not None:
        level, step = _flat_level(view, flat), view.step_of(flat.ordinal)
        text, seen, usual = f"{_shares(flat)} at step {step}.", flat.share, flat.before
        return Observation(text, level=level, signal=flat.signal, step=step, observed=seen, expected=usual)
    if found is None:
        return None
    return Observation(found.text, level="finding alone", signal="activations", step=found.at.step)


def _flat_level(view: EpisodeView, flat: FlatUnits) -> str:
    is_recurrent = _kinds(view).get(flat.name) in RECURRENT
    if flat.nearly_all:
        return "nearly all"
    if flat.grown < (MIN_GROWTH_RECURRENT if is_recurrent else MIN_GROWTH):
        return "alive"
    return "new" if flat.before <= MAX_FLAT_BEFORE else "more"


FLAT_UNITS: Final = first_of("flat_units", _silent_by_experiment, _dropout, _flat_share)
SUPPORTING_LEVELS: Final = frozenset({"silent", "nearly all", "new", "more", "finding alone"})
"""Levels of `FLAT_UNITS` that support flat units."""


@observer("lasting", signal="activations")
def lasting(view: EpisodeView) -> Observation | None:
    """Units that stayed flat."""
    found = view.once(_finding)
    if found is None or view.once(flattest_layer) is None or _units_level(view) == "dropout":
        return None
    return Observation(found.text, step=found.at.step)


@observer("untouched", "alive")
def alive_after_rise(view: EpisodeView) -> Observation | None:
    """The layer was alive after the loss had risen, so it went flat later."""
    flat = view.once(flattest_layer)
    look = None if flat is None or view.once(_silent) is not None else share_after_onset(view, flat)
    if flat is None or look is None:
        return None
    (at, share), growth = look, rms_growth(view, flat.name, look[0])
    louder = flat.kind == "dead" and growth is not None and growth[0] >= LOUDER_FACTOR  # saturation bounds the outputs
    if not louder and not share - flat.before < STILL_ALIVE_SHARE * flat.grown:
        return None
    untouched = louder or share - flat.before < UNTOUCHED_SHARE * flat.grown
    level = "untouched" if untouched and view.sudden else "alive"
    how = "louder than before" if louder else f"still alive ({100.0 * share:.3g} % flat)"
    text = f"At step {view.step_of(at)}, after the loss had risen, {flat.name} was {how}."
    return Observation(text, level=level, signal=flat.signal, observed=share, expected=flat.before)


RISE: Final = "rise_after_ordinary_updates"
"""The observer of `UPSTREAM` that supports the layers themselves."""


def _if_flat(one: Observer) -> Observer:
    """Restrict an observer of upstream causes to flat units; a jump before they went flat does not support them."""

    def counts(view: EpisodeView) -> bool:
        if one.name != RISE:
            return _units_level(view) in SUPPORTING_LEVELS
        found, alive = one(view), alive_after_rise(view)
        is_earlier = alive is not None and alive.level == "untouched" and found is not None and found.level != "gradual"
        return _units_level(view) in SUPPORTING_LEVELS and not is_earlier

    return only_if(counts, one)


def _units_level(view: EpisodeView) -> str | None:
    found = FLAT_UNITS(view)
    return None if found is None else found.level


def _finding(view: EpisodeView) -> Finding | None:
    first, last = view.onset - BATCHES_BEFORE, max(view.last, view.onset + BATCHES_AFTER)
    return next(iter(view.findings("activations", "flat", first=first, last=last)), None)


def _silent(view: EpisodeView) -> tuple[str, float] | None:
    grown = grown_module(view) if computation_changed(view) else None
    if grown is None or grown[1] > SILENT_FACTOR or _kinds(view).get(grown[0]) not in ACTIVATIONS:
        return None
    return grown


def _kinds(view: EpisodeView) -> dict[str, str]:
    """The classes of the measured modules, by name."""
    measured = view.experiments.modules
    return {} if measured is None else {m.module: m.kind for m in measured.modules}


def _shares(flat: FlatUnits) -> str:
    share, before = f"{100.0 * flat.share:.3g} %", f"{100.0 * flat.before:.3g} %"
    return f"{share} of the outputs of {flat.name} are {flat.kind} (usually {before})"


def _summary(view: EpisodeView) -> str:
    flat = view.once(flattest_layer)
    if flat is None:
        return f"Units have gone flat, and {view.loss_text}."
    if view.episode.loss_peak is None:
        return f"{_shares(flat)}, though the loss does not show it."
    return f"{_shares(flat)}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    flat = view.once(flattest_layer)
    if flat is None:
        return (Fix("Put a norm layer before the activation, or use one that is not flat: LeakyReLU(0.01)."),)
    other = "put a norm layer before it" if flat.kind != "dead" else "use LeakyReLU(0.01) or GELU in its place"
    text = f"Check the inputs of {flat.name}: they have moved into its flat part. {_shares(flat)}; {other}."
    return (
        Fix(text, Change(setting="activation", value=flat.name)),
        Fix("Bring inputs back to their usual range (the normalisation before it, the bias of the layer before it)."),
    )


CAUSE: Final = Cause(
    id="activation_saturation",
    family=Family.NUMERICS,
    title="Dead or saturated units",
    meaning="dead ReLUs, saturated sigmoid or tanh",
    observations=(FLAT_UNITS, lasting, alive_after_rise, *map(_if_flat, UPSTREAM)),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({"gradient_vanishing"}),
    sufficient_findings=frozenset({("activations", "flat")}),
)
