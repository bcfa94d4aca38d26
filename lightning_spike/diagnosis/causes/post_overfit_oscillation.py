"""`post_overfit_oscillation`: training goes on after it has overfitted, and its loss swings wider and wider."""

import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.repeats import Repeats, repeats
from lightning_spike.diagnosis.observations.tells import tell, without_none
from lightning_spike.diagnosis.observations.upstream import rate_to_blame
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, ValidationPoint

LEAST_VALIDATIONS: Final = 3
"""Validations below which a curve says nothing."""
CLEAR_RISE: Final = 0.05
"""Share by which the validation loss must be above its best: Prechelt's GL of 5, as in `overfitting`."""
AGAIN: Final = 2
"""Validations that must lie so far above it: a single one may do so by chance."""
GAP: Final = 1.5
"""Validation loss over training loss just before the onset from which the training set is known by heart (SMD's rule is 1.1, which healthy nets with dropout reach)."""
SWING: Final = 2.0
"""Times the level before it that the loss must reach in its swings."""
UP: Final = 0.6
"""Share of the way from that level to the highest loss, on the log scale, that is up …"""
BACK: Final = 0.4
"""… and that is back."""
SWINGS: Final = 3
"""Swings up and back that make an oscillation."""
AHEAD: Final = 160
"""Batches after the onset in which they are counted."""
APART: Final = 1.25
"""Factor between the losses of altered batches and of those that came as before from which it is the alteration that hits, as `LEAST_RATIO` for single values."""


class PostOverfitOscillation(Cause):
    """Training goes on after it has overfitted: the loss is near its floor, and every small change of the data makes it swing, wider and wider, while the validation loss rises.

    Seen by: a validation loss above its best before the trouble began; a training loss far below it; the same few batches again and again, which are known by heart whatever the validation
    says, and which still have their low loss where altered ones have a high one; a loss that goes up and comes back several times.

    Against it: a validation loss at its best, or too few validations, where the batches are new (without either there is no overfitting to be seen, science.md 5); a high loss of the very batches
    that are known by heart (then the weights are at fault); a single rise.

    Thresholds: 5 % above the best validation is a clear rise (Prechelt 1998, GL of 5); a swing is a loss that went up 60 % of the way to the highest one, on the log scale, and came 60 % of it back;
    what counts as the same few batches is said in `diagnosis/observations/repeats.py`.

    To do: stop at the best validation and take its weights; odd batches are not the trouble but what shows it.
    """

    id: ClassVar = "post_overfit_oscillation"
    family: ClassVar = Family.GENERALIZATION
    title: ClassVar = "Swings after overfitting"
    applies_to: ClassVar = LOSS_ROSE - {EpisodeKind.NONFINITE}
    explains: ClassVar = frozenset({"overfitting", "bad_batch", "data_drift", "label_noise"})

    @override
    def examine(self, case: Case) -> Examination:
        points = _curve(case)
        best = min(points, key=lambda p: p.value, default=None)
        again = repeats(case)
        evidence = without_none(
            _risen(case, points, best, again),
            _gap(case, points, again),
            _by_heart(case, again),
            _altered(case, again),
            _swings(case),
            rate_to_blame(case, event=-DECISIVE, climb=-DECISIVE),
        )
        stop = best.at.step if best is not None else None
        return Examination(
            evidence=evidence,
            summary=_summary(case, points, best, again),
            fixes=_fixes(best),
            change=Change(setting="max_steps", value=stop) if stop is not None else None,
        )


def _curve(case: Case) -> list[ValidationPoint]:
    """The validations up to the onset, of the metric that comes first by name; finite ones only."""
    names = sorted({p.metric for p in case.store.validations})
    points = [p for p in case.store.validations if p.metric in names[:1] and number(p.value) is not None]
    return [p for p in points if p.at.ordinal < case.onset - GUARD]


def _risen(
    case: Case, points: list[ValidationPoint], best: ValidationPoint | None, again: Repeats | None
) -> Evidence | None:
    """A validation loss that goes on falling speaks against it, but not where few batches came so often: what is learnt by heart may do the validation some good still."""
    if best is None or len(points) < LEAST_VALIDATIONS or not best.value > 0.0:
        text = "There are too few validations before it to call this overfitting."
        return tell("val_loss", text, -DECISIVE, step=case.step) if again is None else None
    now = points[-1]
    share = now.value / best.value - 1.0
    text = f"Before the loss rose {now.metric} was {now.value:.3g} at step {now.at.step}; its best was {best.value:.3g} at step {best.at.step}."
    above = [p for p in points[points.index(best) + 1 :] if p.value >= (1.0 + CLEAR_RISE) * best.value]
    weight = (STRONG if len(above) >= AGAIN else SLIGHT) if share >= CLEAR_RISE else -DECISIVE if again is None else 0.0
    return tell(now.metric, text, weight, step=now.at.step, observed=now.value, expected=best.value)


def _gap(case: Case, points: list[ValidationPoint], again: Repeats | None) -> Evidence | None:
    before = case.episode.loss_before
    if before is None or not points:
        return None
    value = points[-1].value
    wide = before * GAP <= value
    text = f"The training loss was {before:.3g} then, the validation loss {value:.3g}."
    weight = FAIR if wide else -DECISIVE if again is None else 0.0
    return tell("loss", text, weight, step=case.step, observed=before, expected=value)


def _by_heart(case: Case, again: Repeats | None) -> Evidence | None:
    if again is None:
        return None
    text = f"{again.came} of the {again.window} batches before were the same {again.kinds} again and again."
    return tell("batch", text, STRONG, step=case.step, observed=float(again.kinds), expected=float(again.window))


def _altered(case: Case, again: Repeats | None) -> Evidence | None:
    """Which batches have the high loss: altered ones, as of a net that knows the others by heart, or those as well."""
    if again is None or again.known is None:
        return None
    if again.altered is None:
        if again.known < SWING:
            return None
        text = f"The very batches that had come before have {again.known:.2g} times the loss of before."
        return tell("loss", text, -STRONG, step=case.step, observed=again.known, expected=1.0)
    apart = again.altered >= APART * again.known
    text = (
        f"Since then batches that had come before have {again.known:.2g} times the loss of before, others {again.altered:.2g} times"
        f"{'' if apart else ': it is not the batch that makes it'}."
    )
    return tell(
        "loss", text, STRONG if apart else -STRONG, step=case.step, observed=again.altered, expected=again.known
    )


def _swings(case: Case) -> Evidence | None:
    """How often the loss went up and came back to its level."""
    found = case.findings("overfit", "widening_swings", first=0, last=max(case.last, case.onset + AHEAD))
    before = case.episode.loss_before
    losses = case.store.history.between(case.episode.signal, case.onset, case.onset + AHEAD)
    losses = losses[np.isfinite(losses)]
    if before is None or not before > 0.0 or losses.size == 0:
        return None
    highest = float(losses.max())
    if not highest >= SWING * before:
        return None
    start = math.log(before)  # logs apart: the ratio of two losses of any size may overflow
    place = (np.log(np.maximum(losses, before)) - start) / (math.log(highest) - start)
    state = np.where(place >= UP, 1, np.where(place <= BACK, -1, 0))
    state = state[state != 0]
    count = int((np.diff(state) == -2).sum())  # noqa: PLR2004 - from 1 to -1
    text = f"The loss went up to as much as {highest:.3g} and came back {count} times in {losses.size} batches."
    weight = STRONG if found or count >= SWINGS else -STRONG
    return tell(case.episode.signal, text, weight, step=case.step, observed=float(count), expected=0.0)


def _summary(case: Case, points: list[ValidationPoint], best: ValidationPoint | None, again: Repeats | None) -> str:
    if again is not None:
        return f"The same {again.kinds} batches came again and again until they were known by heart, and now every one that is altered makes the loss swing: {case.loss_text}."
    if best is None or not points:
        return f"The training swings after it has overfitted: {case.loss_text}."
    now = points[-1]
    return f"Training went on after {now.metric} was best (step {best.at.step}, {best.value:.3g}; {now.value:.3g} by step {now.at.step}), and now every odd batch makes the loss swing: {case.loss_text}."


def _fixes(best: ValidationPoint | None) -> tuple[str, ...]:
    more = "If it must go on: more data, augmentation from the start, weight decay or dropout; odd batches only show what is wrong."
    if best is None:
        return ("Stop at the best validation: OverfitWatcher(stop=True, restore_best=True).", more)
    return (
        f"Stop at step {best.at.step}, where {best.metric} was best ({best.value:.3g}), and take those weights: OverfitWatcher(stop=True, restore_best=True).",
        more,
    )
