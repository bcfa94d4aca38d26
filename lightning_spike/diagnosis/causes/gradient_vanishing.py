"""`gradient_vanishing`: gradients die out on their way back through the layers."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.measured import falls_off
from lightning_spike.diagnosis.observations.tells import gradient_all_but_gone, tell, without_none
from lightning_spike.diagnosis.observations.upstream import from_elsewhere
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

AHEAD: Final = 96
"""Batches after the onset in which it is looked for: the finding takes twice 16 rows, and up to 16 more to begin."""
HALF: Final = 0.5
"""Of its usual norm: down to that a gradient has not vanished."""
STEEP: Final = 100.0
"""Times as much as before that the gradient falls off between two modules by experiment, from which layers in between swallow it; an engineering choice."""
FAR: Final = 1000.0
"""Times that the norm has fallen from which a layer learns nothing any more (AUTOTRAINER's ratio of the first layer and the last)."""


class GradientVanishing(Cause):
    """Gradients die out on their way back: too many sigmoids one after the other, without normalisation or residuals.

    Seen by: the finding `vanished`: gradient norms of some layers have fallen to a fraction of their own past, far more than those of others, while the loss is no lower;
    by experiment, that with the weights and batches of before the gradient now falls off a hundred times as much from one module to an earlier one.

    Against it: gradients as they were; damage that came with a long step, an odd batch or writes by others. Units that went flat first are its cause.

    Thresholds: see `detectors.layer_falls`; a thousandth is AUTOTRAINER's.

    To do: norm layers or residual connections around the layers that get nothing; ReLU or GELU in place of sigmoids; He or Xavier initialisation.
    """

    id: ClassVar = "gradient_vanishing"
    family: ClassVar = Family.GRADIENT
    title: ClassVar = "Vanishing gradients"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    standing: ClassVar = frozenset({("gradients", "vanished")})

    @override
    def examine(self, case: Case) -> Examination:
        last = max(case.last, case.onset + AHEAD)
        found = next(iter(case.findings("gradients", "vanished", first=case.onset - AHEAD, last=last)), None)
        fall = falls_off(case)
        steep = fall if found is None and fall is not None and fall[2] >= STEEP else None
        evidence = without_none(
            _fallen(case, found) if steep is None else _falls_off(case, *steep),
            _stands(case, found),
            gradient_all_but_gone(case, STRONG) if found else None,
            _came_after(case, found),
            *(from_elsewhere(case) if found or steep else ()),
        )
        worst = _worst(found) if steep is None else steep[0]
        return Examination(
            evidence=evidence,
            summary=_summary(case, found, worst),
            fixes=_fixes(found, worst),
            change=Change(setting="normalization_layer", value=worst) if worst else None,
        )


def _worst(found: Finding | None) -> str:
    """The module whose parameter has lost most of its gradient."""
    names = found.detail.get("names") if found is not None else None
    first = str(names[0]) if isinstance(names, list | tuple) and names else ""
    return first.rpartition(".")[0] or first


def _factor(found: Finding) -> float | None:
    """By what factor the worst norm has fallen; infinite where it is 0."""
    before, now = number(found.detail.get("before")), number(found.detail.get("now"))
    if before is None or now is None or not before > 0.0 or now < 0.0:
        return None
    return before / now if now > before * 1e-300 else math.inf


def _fallen(case: Case, found: Finding | None) -> Evidence | None:
    if found is None:
        known = any(name.split("/")[0] == "grad_norm" for name in case.store.layers)
        return tell("grad_norm", "No layer has lost its gradient.", -DECISIVE, step=case.step) if known else None
    text, factor = found.detail.get("text"), _factor(found)
    words = text if isinstance(text, str) and text else "Gradients have all but vanished."
    weight = DECISIVE if factor is not None and factor >= FAR else STRONG
    return tell(
        "grad_norm",
        words,
        weight,
        step=found.at.step,
        observed=number(found.detail.get("now")),
        expected=number(found.detail.get("before")),
    )


def _falls_off(case: Case, early: str, late: str, factor: float) -> Evidence:
    text = f"With the weights and batches of before, the gradient falls off {factor:.3g} times as much as it did on its way from '{late}' back to '{early}'."
    return tell("lab/measured", text, STRONG, step=case.step, observed=factor, expected=1.0)


def _came_after(case: Case, found: Finding | None) -> Evidence | None:
    """The gradients that vanished were as large as ever when the loss had jumped: they went with what the jump did to the weights."""
    names, before = (
        (found.detail.get("names"), number(found.detail.get("before"))) if found is not None else (None, None)
    )
    layers = case.store.layer_names.get("grad_norm", ())
    if (
        not isinstance(names, list | tuple)
        or not names
        or names[0] not in layers
        or before is None
        or case.sudden is not True
    ):
        return None
    place = layers.index(names[0])
    rows = case.store.layer_rows("grad_norm", case.onset, case.onset + 1)
    norms = [float(row.values[place]) for row in rows if len(row.values) == len(layers)]
    if not norms or not min(norms) >= HALF * before > 0.0:
        return None
    text = f"When the loss had jumped, the gradient of {names[0]} was as large as ever ({min(norms):.3g}): it vanished later."
    return tell("grad_norm", text, -STRONG, step=case.step, observed=min(norms), expected=before)


def _stands(case: Case, found: Finding | None) -> Evidence | None:
    if found is None or case.kind is not EpisodeKind.STALL or case.episode.loss_before is None:
        return None
    return tell(case.episode.signal, "The loss stands still.", SLIGHT, step=case.step)


def _summary(case: Case, found: Finding | None, worst: str) -> str:
    if found is None:
        where = f" on their way back to {worst}" if worst else ""
        return f"Gradients have vanished{where}, and {case.loss_text}."
    factor, count, of = _factor(found), number(found.detail.get("count")), number(found.detail.get("of"))
    times = "to nothing" if factor is None or not math.isfinite(factor) else f"{factor:.3g} times"
    many = f"{count:.0f} of {of:.0f} parameters" if count is not None and of is not None else "some parameters"
    what = f"By step {found.at.step} the gradients of {many} had all but vanished, most in {worst}, where they fell {times}"
    return (
        f"{what}; {case.loss_text}."
        if case.episode.loss_peak is not None
        else f"{what}; the loss has shown nothing of it."
    )


def _fixes(found: Finding | None, worst: str) -> tuple[str, ...]:
    where = f"around {worst}, which gets no gradient any more" if worst else "around the early layers"
    now, before = (number(found.detail.get(key)) for key in ("now", "before")) if found is not None else (None, None)
    norms = f" ({now:.2g}, before {before:.2g})" if now is not None and before is not None else ""
    return (
        f"Put a norm layer or a residual connection {where}{norms}.",
        "Use ReLU or GELU in place of sigmoid or tanh between the layers, with He or Xavier initialisation.",
    )
