"""`bad_initialization`: weights that are far too large or too small from the start."""

import dataclasses
import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.layers import layer_table
from lightning_spike.diagnosis.observations.tells import tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

USUAL: Final = 0.58
"""Root mean square of torch's default weights over 1 / sqrt(fan-in): uniform in ±1 / sqrt(fan-in)."""
FAR: Final = 8.0
"""Scale over 1 / sqrt(fan-in) that no initialisation in use has by far; from 4 on it is found at all (`WeightMonitor`)."""
EARLY: Final = 128
"""Batches in which what weights began as may show by itself: the loss is still on its way down."""
LATE: Final = 512
"""… and after which it cannot, since updates have made other weights of them."""
FIRST: Final = 4
"""Losses that make the first level."""
CHANCE: Final = 2.0
"""Times the loss of guessing from which a first loss is extreme: sound nets begin at about 1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Worst:
    """The weight whose initial scale is farthest off."""

    name: str
    scale: float
    """Root mean square over 1 / sqrt(fan-in)."""


class BadInitialization(Cause):
    """Weights that are far too large or too small from the start: a standard deviation of 1 where a small one was meant, a fan counted wrongly.

    Seen by: the scale of the weights at the first batch against 1 / sqrt(fan-in); a first loss far above that of guessing; trouble in the first batches.

    Against it: weights of a usual scale; trouble that came when training had gone well for long; a run that was resumed, whose weights are no initial ones.

    Thresholds: the usual initialisations lie between 0.1 and 2.4 of 1 / sqrt(fan-in) (torch's default 0.58, Xavier and He up to 1.4, with the largest gain 2.4); 4 and 8 are
    beyond all of them. The loss of guessing among n classes is log n.

    To do: the layer's default initialisation, or the factor that brings its weights there.
    """

    id: ClassVar = "bad_initialization"
    family: ClassVar = Family.NUMERICS
    title: ClassVar = "A bad initialisation"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset(
        {
            "lr_too_high",
            "warmup_too_short",
            "gradient_explosion",
            "activation_saturation",
            "gradient_vanishing",
            "numerical_instability",
        }
    )
    standing: ClassVar = frozenset({("weights", "initial_scale")})

    @override
    def examine(self, case: Case) -> Examination:
        found = next(iter(case.findings("weights", "initial_scale", first=0, last=case.last)), None)
        worst = _worst(case, found)
        evidence = without_none(_scale(case, found, worst), _first_loss(case, found), _early(case, found))
        return Examination(
            evidence=evidence,
            summary=_summary(case, found, worst),
            fixes=_fixes(worst),
            change=Change(setting="initialization", value=worst.name) if worst is not None else None,
        )


def _worst(case: Case, found: Finding | None) -> _Worst | None:
    """By the vector of initial scales; by the finding, which may have outlived it."""
    if found is None:
        return None
    small = found.detail.get("direction") == "small"
    table = layer_table(case, "initial_scale", 0, found.at.ordinal)
    scales = table.values[0] if len(table.values) else np.zeros(0)
    held = np.where(scales > 0.0, scales, np.inf if small else -np.inf)
    if np.isfinite(held).any() and not np.isnan(scales).all():
        place = int(held.argmin() if small else held.argmax())
        return _Worst(name=table.names[place], scale=float(scales[place]))
    names, scale = found.detail.get("names"), number(found.detail.get("scale"))
    if isinstance(names, list | tuple) and names and scale is not None and scale > 0.0:
        return _Worst(name=str(names[0]), scale=scale)
    return None


def _scale(case: Case, found: Finding | None, worst: _Worst | None) -> Evidence | None:
    if found is None:
        resumed = case.facts.resumed_from is not None or case.facts.first_step > 0
        if resumed:
            return tell("initial_scale", "The run was resumed, so its weights are no initial ones.", -DECISIVE)
        if not case.store.layer_names.get("initial_scale"):
            return None
        return tell("initial_scale", "The weights began at a usual scale.", -DECISIVE, step=0)
    text = found.detail.get("text")
    words = text if isinstance(text, str) and text else "The weights began at an unusual scale."
    far = worst is not None and worst.scale >= FAR
    return tell(
        "initial_scale",
        words,
        DECISIVE if far else STRONG,
        step=found.at.step,
        observed=worst.scale if worst is not None else None,
        expected=USUAL,
    )


def _first_loss(case: Case, found: Finding | None) -> Evidence | None:
    """The first losses against that of guessing, where targets are classes."""
    losses = case.store.history.between("loss", 0, FIRST - 1)
    classes = _classes(case)
    if found is None or losses.size == 0 or classes is None or case.onset > LATE:
        return None
    finite = losses[np.isfinite(losses)]
    guess = math.log(classes)
    first = float(np.median(finite)) if finite.size else math.inf
    extreme = first > CHANCE * guess
    text = f"The first losses were {first:.3g}; guessing among the {classes} classes of the first batches gives {guess:.3g}."
    weight = FAIR if extreme else -SLIGHT
    return tell("loss", text, weight, step=0, observed=first if math.isfinite(first) else None, expected=guess)


def _classes(case: Case) -> int | None:
    """How many classes the targets have that were seen (the histogram counts them modulo 64); `None` where they are no classes."""
    signals = [s for s in case.store.layer_names if s.startswith("batch/") and s.endswith("/histogram")]
    seen = [layer_table(case, signal, 0, EARLY).values for signal in signals]
    counts = [int((np.nan_to_num(values) > 0.0).any(axis=0).sum()) for values in seen if values.size]
    return counts[0] if len(counts) == 1 and counts[0] > 1 else None


def _early(case: Case, found: Finding | None) -> Evidence | None:
    if found is None:
        return None
    if case.onset <= EARLY:
        return tell(
            "loss",
            f"The trouble is at step {case.step}, with the weights that training began with.",
            FAIR,
            step=case.step,
        )
    if case.onset > LATE:
        text = f"Training had gone on for {case.onset} batches before, and made other weights of the first ones."
        return tell("loss", text, -DECISIVE, step=case.step)
    return None


def _summary(case: Case, found: Finding | None, worst: _Worst | None) -> str:
    if found is None or worst is None:
        return f"The weights began at an unusual scale, and {case.loss_text}."
    count, of = number(found.detail.get("count")), number(found.detail.get("of"))
    many = f"{count:.0f} of {of:.0f} weights" if count is not None and of is not None else "Weights"
    first = case.store.history.between("loss", 0, 0)
    began = f"; the loss began at {first[0]:.3g}" if first.size and math.isfinite(first[0]) else ""
    what = "large" if found.detail.get("direction") != "small" else "small"
    return f"{many} were far too {what} from the start, {worst.name} most: {worst.scale:.3g} times 1 / sqrt(fan-in), usually {USUAL:g} to 1.4{began}."


def _fixes(worst: _Worst | None) -> tuple[str, ...]:
    if worst is None:
        return ("Initialise the layers as torch does by default: layer.reset_parameters().",)
    factor = float(f"{USUAL / worst.scale:.2g}") if worst.scale > 0.0 else 1.0
    reset = (
        f"Initialise {worst.name} as torch does by default (layer.reset_parameters()), or multiply its first values by {factor:g}: "
        f"they are {worst.scale:.3g} times 1 / sqrt(fan-in), torch's {USUAL:g}. The same for the others."
    )
    return (reset, "A norm layer behind a layer makes its scale matter less.")
