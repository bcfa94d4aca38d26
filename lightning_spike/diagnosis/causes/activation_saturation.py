"""`activation_saturation`: units that are dead or saturated, so that they compute nothing and learn nothing."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, STRONG
from lightning_spike.diagnosis.observations.layers import layer_table, usual_of
from lightning_spike.diagnosis.observations.measured import computes_otherwise, grown_module, measured
from lightning_spike.diagnosis.observations.tells import tell
from lightning_spike.diagnosis.observations.upstream import from_elsewhere
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

SIGNALS: Final = {"activation_zeros": "dead", "activation_dead": "dead", "activation_saturated": "saturated"}
AHEAD: Final = 128
"""Batches after the onset in which flat units are looked for: activations are measured every 50 batches."""
BACK: Final = 100
"""… and before it."""
FLAT: Final = 0.8
"""Share of a layer's outputs in the flat parts from which it hardly computes anything (TheDeepChecker: 0.85)."""
LOUD: Final = 2.0
"""Factor on the root mean square of a layer's outputs from which it is clearly louder than it was."""
LEFT: Final = 0.25
"""Share of what was not flat before that is left of it, at the most, for that to be new: half of a healthy ReLU's outputs are 0."""
NONE: Final = 0.02
"""Flat share up to which a layer had as good as no flat outputs before."""
MORE: Final = 0.2
"""Growth of the flat share from which a layer has changed at all."""
UNTOUCHED: Final = 0.1
"""Part of the growth of the flat share up to which none of it was there yet."""
SILENT: Final = 0.5
"""Factor on an activation's outputs in an ordinary batch from which its units have as good as stopped, where it is the first module of which a size has changed threefold."""
GATED: Final = 0.1
"""Share of a recurrent layer's outputs at their bounds, where there were none before, from which its gates are too: an output is a product with one."""
RECURRENT: Final = frozenset({"RNN", "GRU", "LSTM"})
ACTIVATIONS: Final = frozenset(
    {
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "PReLU",
        "ELU",
        "SELU",
        "CELU",
        "GELU",
        "SiLU",
        "Mish",
        "Softplus",
        "Hardswish",
        "Hardsigmoid",
        "Hardtanh",
        "Sigmoid",
        "Tanh",
    }
)
"""Classes of torch whose outputs are flat somewhere."""
LOUDER: Final = 1.25
"""Factor on the root mean square of a layer's outputs, and of those behind it, from which what is left of them is larger than before: units that die take their share with them, dropout scales up
the rest by 1 / (1 - p)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Flat:
    """The layer whose outputs went flat most."""

    name: str
    signal: str
    ordinal: int
    share: float
    before: float

    @property
    def clear(self) -> bool:
        """Hardly anything is left of what it computed."""
        return self.share >= FLAT and 1.0 - self.share <= LEFT * (1.0 - self.before)


class ActivationSaturation(Cause):
    """Units that are dead or saturated: a bias that ran away, inputs of a layer in other units, a normalisation that was taken out.

    Seen by: the share of a layer's outputs in the flat part of its activation, against the layer's own past: half of a healthy ReLU's outputs are 0. With it the gradients of the
    layers before vanish, and the loss jumps from one batch to the next after ordinary updates.

    Against it: layers as alive as ever, also when the loss had risen already; outputs that are larger as a whole than before, though most of them are 0 (that is dropout); whatever may have done the damage to the weights first: an event of the learning rate, an exploded gradient,
    an odd batch, weights that somebody wrote.

    Thresholds: a quarter of what was alive before is left, and 80 % is flat (TheDeepChecker's rules say 85 % saturated, or half of the units dead).

    To do: a norm layer before the activation, or one that is not flat; the usual initialisation and a lower rate where steps killed the units.
    """

    id: ClassVar = "activation_saturation"
    family: ClassVar = Family.NUMERICS
    title: ClassVar = "Dead or saturated units"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset({"gradient_vanishing"})
    standing: ClassVar = frozenset({("activations", "flat")})

    @override
    def examine(self, case: Case) -> Examination:
        found = _finding(case)
        flat, silent = _flattest(case), _silent(case)
        dropped = _dropped(case, flat) if silent is None else None
        units = silent or (_units(case, found, flat) if dropped is None else dropped)
        against = from_elsewhere(case) if units is not None and units.weight > 0.0 else ()
        lasting = _lasting(found) if flat is not None and dropped is None else None
        alive = _alive_after(case, flat) if silent is None else None
        if alive is not None and alive.weight <= -DECISIVE:
            against = tuple(e for e in against if e.weight <= 0.0)  # a jump that came before is not of its making
        evidence = tuple(e for e in (units, lasting, alive, *against) if e is not None)
        return Examination(
            evidence=evidence,
            summary=_summary(case, flat),
            fixes=_fixes(flat),
            change=Change(setting="activation", value=flat.name) if flat is not None else None,
        )


def _finding(case: Case) -> Finding | None:
    last = max(case.last, case.onset + AHEAD)
    return next(iter(case.findings("activations", "flat", first=case.onset - BACK, last=last)), None)


def _flattest(case: Case) -> _Flat | None:
    """The layer of which least is left against what was alive in it before, from the rows around the onset on."""
    told = [flat for signal in SIGNALS if (flat := _of(case, signal)) is not None]
    return min(told, key=lambda f: (1.0 - f.share) / max(1.0 - f.before, 1e-9), default=None)


def _of(case: Case, signal: str) -> _Flat | None:
    quiet = not case.store.episodes
    usual = usual_of(case, signal, case.onset - BACK if quiet else None)
    table = layer_table(case, signal, case.onset - (BACK if quiet else GUARD), max(case.last, case.onset + AHEAD))
    if usual is None or not np.isfinite(table.values).any():
        return None
    left = (1.0 - table.values) / np.maximum(1.0 - usual, 1e-9)
    left = np.where(np.isfinite(left), left, np.inf)
    if not np.isfinite(left).any():
        return None
    row, column = np.unravel_index(int(left.argmin()), left.shape)
    return _Flat(
        name=table.names[column],
        signal=signal,
        ordinal=int(table.ordinals[row]),
        share=float(table.values[row, column]),
        before=float(usual[column]),
    )


def _units(case: Case, found: Finding | None, flat: _Flat | None) -> Evidence | None:
    if flat is None:
        if found is None:
            return None
        text = found.detail.get("text")
        words = text if isinstance(text, str) and text else "Units have gone flat."
        return tell("activations", words, STRONG, step=found.at.step)
    grew = flat.share - flat.before >= (GATED if _kinds(case).get(flat.name) in RECURRENT else MORE)
    text = (
        f"{100.0 * flat.share:.3g} % of the outputs of {flat.name} are {SIGNALS[flat.signal]} at step {case.step_of(flat.ordinal)}"
        f", usually {100.0 * flat.before:.3g} %."
    )
    new = grew and flat.before <= NONE
    weight = DECISIVE if flat.clear else STRONG if new else FAIR if grew else -DECISIVE
    return tell(flat.signal, text, weight, step=case.step_of(flat.ordinal), observed=flat.share, expected=flat.before)


def _dropped(case: Case, flat: _Flat | None) -> Evidence | None:
    """Zeros in an output that is larger as a whole: the first look at which the layer was flat, against healthy ones; later the net has got used to it."""
    if flat is None or SIGNALS[flat.signal] != "dead" or flat.share - flat.before < MORE:
        return None
    at = _first_flat(case, flat)
    usual = usual_of(case, "activation_rms", at)
    table = layer_table(case, "activation_rms", at, at)
    if usual is None or len(table.values) == 0 or flat.name not in table.names:
        return None
    place = table.names.index(flat.name)
    here = slice(place, place + 2)  # with the module behind it: the layer may stand for what goes into its activation
    times = table.values[0, here] / np.where(usual[here] > 0.0, usual[here], np.nan)
    if not (times >= LOUDER).all():
        return None
    now, before = float(table.values[0, place]), float(usual[place])
    text = (
        f"Most outputs of {flat.name} are 0 at step {case.step_of(at)}, but as a whole they are larger than before (root mean square {now:.3g}, usually {before:.3g}), and so is "
        "what comes behind: outputs are left out and the others scaled up, as by dropout."
    )
    return tell("activation_rms", text, -DECISIVE, step=case.step_of(at), observed=now, expected=before)


def _first_flat(case: Case, flat: _Flat) -> int:
    """Ordinal of the first look at which the layer was at least half as flat as it got."""
    table = layer_table(case, flat.signal, case.onset - (GUARD if case.store.episodes else BACK), flat.ordinal)
    shares = table.values[:, table.names.index(flat.name)]
    flat_then = np.flatnonzero(shares - flat.before >= 0.5 * (flat.share - flat.before))
    return int(table.ordinals[flat_then[0]]) if flat_then.size else flat.ordinal


def _silent(case: Case) -> Evidence | None:
    """By experiment: with the weights and batches of before an activation gives next to nothing of what it gave, and it is the first module that is out of the ordinary."""
    grown, kinds = grown_module(case) if computes_otherwise(case) else None, _kinds(case)
    if grown is None or grown[1] > SILENT or kinds.get(grown[0]) not in ACTIVATIONS:
        return None
    text = f"With the weights and batches of before, the outputs of '{grown[0]}' ({kinds[grown[0]]}) are {grown[1]:.2g} times their usual size, and what goes into it is as always."
    return tell("lab/measured", text, DECISIVE, step=case.step, observed=grown[1], expected=1.0)


def _kinds(case: Case) -> dict[str, str]:
    """The classes of the modules that the lab has measured, by name."""
    modules = (measured(case, "modules") or {}).get("modules")
    named = [m for m in modules if isinstance(m, Mapping)] if isinstance(modules, list | tuple) else []
    return {str(m.get("module")): str(m.get("kind")) for m in named}


def _lasting(found: Finding | None) -> Evidence | None:
    if found is None:
        return None
    text = found.detail.get("text")
    words = text if isinstance(text, str) and text else "The units have stayed flat."
    return tell("activations", words, FAIR, step=found.at.step)


def _alive_after(case: Case, flat: _Flat | None) -> Evidence | None:
    """A look at the same layer when the loss had risen already, at which it was as alive as ever: it went flat later."""
    if flat is None:
        return None
    table = layer_table(case, flat.signal, case.onset + 1, flat.ordinal - 1)
    if len(table.values) == 0 or flat.name not in table.names:
        return None
    at, share = int(table.ordinals[0]), float(table.values[0, table.names.index(flat.name)])
    louder = SIGNALS[flat.signal] == "dead" and _is_louder(case, flat.name, at)  # saturated ones are at their bounds
    if not louder and not share - flat.before < 0.5 * (flat.share - flat.before):
        return None
    how = "as a whole louder than ever" if louder else f"alive still ({100.0 * share:.3g} %)"
    text = f"At step {case.step_of(at)}, after the loss had risen, {flat.name} was {how}."
    untouched = louder or share - flat.before < UNTOUCHED * (flat.share - flat.before)
    weight = -DECISIVE if untouched and case.sudden else -STRONG
    return tell(flat.signal, text, weight, step=case.step, observed=share, expected=flat.before)


def _is_louder(case: Case, name: str, at: int) -> bool:
    """Whether a layer's outputs at a look are larger as a whole than at the healthy ones before."""
    usual, table = usual_of(case, "activation_rms", at), layer_table(case, "activation_rms", at, at)
    if usual is None or len(table.values) == 0 or name not in table.names:
        return False
    place = table.names.index(name)
    return bool(table.values[0, place] >= LOUD * usual[place] > 0.0)


def _summary(case: Case, flat: _Flat | None) -> str:
    if flat is None:
        return f"Units have gone flat, and {case.loss_text}."
    what = f"{100.0 * flat.share:.3g} % of the outputs of {flat.name} are {SIGNALS[flat.signal]}, usually {100.0 * flat.before:.3g} %"
    return (
        f"{what}, and {case.loss_text}."
        if case.episode.loss_peak is not None
        else f"{what}, though the loss has shown nothing of it."
    )


def _fixes(flat: _Flat | None) -> tuple[str, ...]:
    if flat is None:
        return ("Put a norm layer before the activation, or use one that is not flat: LeakyReLU(0.01).",)
    other = (
        "LeakyReLU(0.01) or GELU in place of it"
        if SIGNALS[flat.signal] == "dead"
        else "a norm layer before it keeps its inputs near 0"
    )
    return (
        f"Look at what {flat.name} gets: its inputs have moved into its flat part ({100.0 * flat.share:.3g} % of its outputs, {100.0 * flat.before:.3g} % before); {other}.",
        "Bring inputs back to their usual range (the normalisation before it, the bias of the layer before it).",
    )
