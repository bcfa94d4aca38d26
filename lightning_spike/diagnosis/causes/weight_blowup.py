"""`weight_blowup`: weights grow, or shrink, with every update until they are extreme."""

import dataclasses
import math
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.layers import shifted_most
from lightning_spike.diagnosis.observations.rates import climbed
from lightning_spike.diagnosis.observations.tells import tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

BACK: Final = 128
"""Batches before the onset in which the growth is looked for: a loss may bear weights that grow for a while."""
AHEAD: Final = 64
"""… and after it: a growth goes on where nobody stops it."""
FASTER: Final = 5.0
"""Times the healthy rate of growth from which it is out of the ordinary."""
LEAST_RATE: Final = 2e-3
"""Growth by update, on the log scale, below which weights take hundreds of updates to double: training itself moves them by up to a thousandth of their size
(the usual ratio of update and weight, science.md 2)."""
STEADY: Final = 2.0
"""Factor by which one rate of a growth by one mechanism may differ from the median rate …"""
MOST: Final = 0.7
"""… in this share of the looks."""
LOOKS: Final = 3
"""Looks at the weights without which there is no growth to be seen."""
DOUBLED: Final = 2.0
"""Growth from which the weights are other weights."""
LITTLE: Final = 1.2
"""… up to which they are as they were."""
ALONG: Final = 0.7
"""Share of an update that lies along the weights themselves from which it is their own growth: a gradient step, and one that overshoots from side to side, lies mostly across them."""
ACROSS: Final = 0.3
"""… and up to which the updates are mostly something else."""
COMPUTED: Final = 0.5
"""Share of the jump from which the lab's experiments find what is computed changed, as elsewhere to confirm a cause: the same weights have another loss."""
BEYOND: Final = 2.0
"""… and from which they cannot have made the growth, which somebody else did."""
DEFAULTS: Final = {"AdamW": 0.01}
"""torch's own weight decay; 1e-4 for the others (He et al. 2016)."""
USUAL_DECAY: Final = 1e-4
SLOW: Final = frozenset({EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION, EpisodeKind.STALL})
"""Episodes whose onset is found afterwards, by a slope."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A stretch of the run in which the norm of all weights grew, or shrank, by about the same factor with every update."""

    first: int
    """Ordinal of the last look at which the weights were as before."""
    shown: int
    """… and of the first at which they were not."""
    last: int
    before: float
    after: float
    rate: float
    """By update, on the log scale; negative where they shrink."""
    steady: bool
    along: float | None
    """How much of the updates' length went into the growth; `None` where updates were not measured."""

    @property
    def factor(self) -> float:
        """By what factor the weights are other than before, at least 1."""
        return math.exp(min(abs(math.log(self.after / self.before)), 600.0))


class WeightBlowup(Cause):
    """Weights grow, or shrink, by the same factor with every update until they are extreme: a sign mistake in the weight decay, or a decay far too strong.

    Seen by: the norm of all weights, which grows geometrically from before the loss rose on, far faster than in this run's healthy part; updates that lie along the weights
    themselves; a setting `weight_decay` that changed while training ran.

    Against it: weights as large as ever; a growth that set in after the loss (then it is damage); a loss that jumped when the weights had hardly changed; a lab that finds the jump with the weights from
    before, too; updates across the weights, as steps make that are too long.

    Thresholds: growth by the run's own rate of growth. A step that overshoots turns the weights round rather than lengthening them: its length is a multiple of what
    it adds to the norm, where a decay of the wrong sign adds all of it.

    To do: put the weight decay back, or give it a usual value and the right sign.
    """

    id: ClassVar = "weight_blowup"
    family: ClassVar = Family.NUMERICS
    title: ClassVar = "Weights that blow up or wither"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset(
        {
            "lr_too_high",
            "gradient_explosion",
            "numerical_instability",
            "activation_saturation",
            "gradient_vanishing",
            "bad_batch",
            "label_noise",
            "hard_sample_streak",
        }
    )

    @override
    def examine(self, case: Case) -> Examination:
        growth = _growth(case)
        changed = _decay_changed(case)
        evidence = without_none(
            _size(case, growth, uneven=-STRONG if changed is None else SLIGHT),
            _along(case, growth),
            _first(case, growth),
            _by_then(case, growth),
            _computed(case),
            _rate(case),
            _setting(changed),
        )
        fix, value = _fix(case, growth, changed)
        return Examination(
            evidence=evidence,
            summary=_summary(case, growth),
            fixes=(
                fix,
                "Weight decay that is decoupled from the gradient (AdamW) acts as it is set, whatever the size of the gradients.",
            ),
            change=Change(setting="weight_decay", value=value),
        )


def _looks(case: Case, signal: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ordinals and values of the looks at a size that gave a finite one above 0."""
    history = case.store.history
    values = history.series(signal)
    held = np.isfinite(values) & (values > 0.0)
    return history.ordinals[held], values[held]


def _growth(case: Case) -> Growth | None:
    """The longest stretch of growth that is out of the ordinary around the onset; a `Growth` without any, of rate 0, where weights stayed as they were; `None` where they were not looked at."""
    ordinals, norms = _looks(case, "weight_norm")
    inside = (ordinals >= case.onset - BACK) & (ordinals <= max(case.last, case.onset + AHEAD))
    if inside.sum() < LOOKS:
        return None
    steps = np.array([case.step_of(int(o)) for o in ordinals], dtype=np.float64)
    rates = np.diff(np.log(norms)) / np.maximum(np.diff(steps), 1.0)
    early = ordinals[1:] < case.onset - BACK
    healthy = (
        rates[early] if early.any() else rates[ordinals[1:] < case.onset - GUARD][: max(int(inside.sum()) // 2, 1)]
    )
    usual = float(np.median(np.abs(healthy))) if healthy.size else 0.0
    fast = np.abs(rates) > max(FASTER * usual, LEAST_RATE)
    start, end = _longest(np.sign(rates) * (fast & inside[1:]))
    if end == start:
        places = np.flatnonzero(inside)
        return _of(case, ordinals, norms, rates, (int(places[0]), int(places[-1])), calm=True)
    return _of(case, ordinals, norms, rates, (start, end), calm=False)


def _longest(signs: npt.NDArray[np.float64]) -> tuple[int, int]:
    """First and last look of the longest run of rates of one sign; two that are the same where there is none."""
    best, start = (0, 0), 0
    for place in range(1, signs.size + 1):
        if place == signs.size or signs[place] != signs[start]:
            if signs[start] != 0.0 and place - start > best[1] - best[0]:
                best = start, place
            start = place
    return best


def _of(
    case: Case,
    ordinals: npt.NDArray[np.int64],
    norms: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
    places: tuple[int, int],
    *,
    calm: bool,
) -> Growth:
    start, end = places
    own = rates[start:end]
    rate = float(np.median(own))
    alike = np.abs(own) < STEADY * abs(rate)
    alike &= np.abs(own) > abs(rate) / STEADY
    return Growth(
        first=int(ordinals[start]),
        shown=int(ordinals[min(start + 1, end)]),
        last=int(ordinals[end]),
        before=float(norms[start]),
        after=float(norms[end]),
        rate=0.0 if calm else rate,
        steady=not calm and end - start >= LOOKS - 1 and bool(alike.mean() >= MOST),
        along=None if calm else _share_along(case, ordinals[start + 1 : end + 1], norms[start + 1 : end + 1], rate),
    )


def _share_along(
    case: Case, ordinals: npt.NDArray[np.int64], norms: npt.NDArray[np.float64], rate: float
) -> float | None:
    """An update along the weights has |1 - exp(-rate)| of their new length, by which the norm then is another; a longer one went elsewhere, too."""
    lengths = [case.at("update_norm", int(ordinal)) for ordinal in ordinals]
    relative = [
        u / w for u, w in zip(lengths, norms.tolist(), strict=True) if u is not None and math.isfinite(u) and u > 0.0
    ]
    return abs(-math.expm1(-rate)) / float(np.median(relative)) if relative else None


def _size(case: Case, growth: Growth | None, *, uneven: float) -> Evidence | None:
    """Growth at one rate is what a factor on the weights makes; one that is uneven weighs `uneven`: with a decay that was changed, steps may add to it."""
    if growth is None:
        return None
    what = "grew" if growth.rate >= 0.0 else "shrank"
    if growth.rate == 0.0 or growth.factor < LITTLE:
        text = f"The norm of all weights went from {growth.before:.3g} to {growth.after:.3g} around the onset, as training moves it."
        return tell("weight_norm", text, -DECISIVE, step=case.step, observed=growth.after, expected=growth.before)
    each = math.exp(growth.rate)
    text = (
        f"The norm of all weights {what} from {growth.before:.3g} at step {case.step_of(growth.first)} to {growth.after:.3g} at step {case.step_of(growth.last)}"
        f", {each:.3g} times with every update{'' if growth.steady else ' on average, though unevenly'}."
    )
    weight = (STRONG if growth.factor >= DOUBLED else FAIR) if growth.steady else uneven
    return tell("weight_norm", text, weight, step=case.step, observed=growth.after, expected=growth.before)


def _along(case: Case, growth: Growth | None) -> Evidence | None:
    if growth is None or growth.along is None or not growth.steady or ACROSS < growth.along < ALONG:
        return None
    share = growth.along
    if share > BEYOND:
        text = f"The size of the weights changed {share:.3g} times as fast as the optimizer's updates can account for: somebody else writes into them."
        return tell("update_norm", text, -STRONG, step=case.step, observed=share)
    rest = "so the updates scale them" if share >= ALONG else "so the steps go elsewhere, and the weights with them"
    text = f"Of the length of the updates {100.0 * min(share, 1.0):.0f} % goes into the size of the weights, {rest}."
    return tell("update_norm", text, STRONG if share >= ALONG else -STRONG, step=case.step, observed=share)


def _first(case: Case, growth: Growth | None) -> Evidence | None:
    """Whether the growth was there before the loss rose."""
    if growth is None or growth.rate == 0.0:
        return None
    late = growth.shown > case.onset + (GUARD if case.kind in SLOW else 0)  # a slow episode is dated back
    text = f"It began {'after' if late else 'before'} the loss rose, between steps {case.step_of(growth.first)} and {case.step_of(growth.last)}."
    return tell("weight_norm", text, -STRONG if late else SLIGHT, step=case.step)


def _by_then(case: Case, growth: Growth | None) -> Evidence | None:
    """A loss that jumps from one batch to the next while the weights are as good as before: what has grown little does little harm, and more of it with every update."""
    if growth is None or growth.rate == 0.0 or case.sudden is not True:
        return None
    by_then = math.exp(min(abs(growth.rate) * max(case.onset - growth.first, 0), 600.0))
    if by_then >= LITTLE:
        return None
    text = f"When the loss jumped the norm of all weights was at most {by_then:.3g} times as before."
    return tell("weight_norm", text, -STRONG, step=case.step, observed=by_then, expected=1.0)


def _computed(case: Case) -> Evidence | None:
    share = case.blame.get("computation", 0.0)
    if share < COMPUTED:
        return None
    text = f"Run again with the weights from before, ordinary batches have the high loss as well ({100.0 * share:.0f} % of the jump): it is not in the weights."
    return tell("lab/blame", text, -DECISIVE, step=case.step, observed=share)


def _rate(case: Case) -> Evidence | None:
    """A rate that climbs makes everything grow by leaps."""
    climb = climbed(case)
    if climb is None:
        return None
    return tell(
        climb.signal,
        f"{climb.text}, which lengthens every update.",
        -STRONG,
        step=case.step,
        observed=climb.now,
        expected=climb.usual,
    )


def _decay_changed(case: Case) -> Finding | None:
    """The last change of a weight decay up to the onset."""
    found = case.findings("optimizer", "settings_changed", first=0, last=case.onset)
    return next((f for f in reversed(found) if f.detail.get("name") == "weight_decay"), None)


def _setting(changed: Finding | None) -> Evidence | None:
    if changed is None:
        return None
    text = changed.detail.get("text")
    now, was = number(changed.detail.get("after")), number(changed.detail.get("before"))
    words = text if isinstance(text, str) and text else "The weight decay changed."
    return tell("weight_decay", words, DECISIVE, step=changed.at.step, observed=now, expected=was)


def _fix(case: Case, growth: Growth | None, changed: Finding | None) -> tuple[str, float]:
    each = (
        f", for the weights are now multiplied by {math.exp(growth.rate):.3g} with every update"
        if growth is not None and growth.rate != 0.0
        else ""
    )
    was, now = (number(changed.detail.get(key)) for key in ("before", "after")) if changed is not None else (None, None)
    if changed is not None and was is not None and now is not None:
        return f"Put the weight decay of {changed.detail.get('optimizer')} back from {now:.3g} to {was:g}{each}.", was
    name = next((o.class_name for o in case.facts.optimizers), "")
    value, present = DEFAULTS.get(name, USUAL_DECAY), case.setting("weight_decay")
    if present is not None and math.isclose(present, value):
        return (
            f"The weight decay was {present:g}, which is usual: find what else scales the weights, or changes the decay{each}.",
            value,
        )
    start = "Set the weight decay" if present is None else f"Set the weight decay from {present:g}"
    return f"{start} to {value:g}, a usual value, and find whatever else scales the weights{each}.", value


def _summary(case: Case, growth: Growth | None) -> str:
    if growth is None or growth.rate == 0.0:
        return f"The weights became extreme, and {case.loss_text}."
    most = shifted_most(case, "weight_max", growth.first, growth.last, down=growth.rate < 0.0)
    where = (
        f" (most in {most.name}: largest value {most.observed:.3g}, usually {most.expected:.3g})"
        if most is not None
        else ""
    )
    return f"From step {case.step_of(growth.first)} on the weights were multiplied by {math.exp(growth.rate):.3g} with every update, to {growth.factor:.3g} times their size{where}, and {case.loss_text}."
