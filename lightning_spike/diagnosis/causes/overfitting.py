"""`overfitting`: training loss falls while validation loss rises."""

from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.tells import tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding, ValidationPoint

LEAST_VALIDATIONS: Final = 4
"""Validations below which a curve says nothing."""
CLEAR_RISE: Final = 0.05
"""Share by which the validation loss must be above its best: Prechelt's GL of 5, the strictest of his thresholds."""
PATIENCE: Final = 5
"""Validations without a new best after which to stop: patience >= 3 to 5 (science.md 5)."""


class Overfitting(Cause):
    """Training loss falls while validation loss rises, so that the model knows its training set by heart and small changes of the data hit hard.

    Seen by: the finding `gap_growing` (the smoothed validation loss has risen in several validations in a row while the training loss went on falling) and
    the validation curve itself.

    Against it: a training loss that rose as well (then it is no overfitting but something that hit both); too few validations. A spike of the *training* loss
    is never called overfitting on its own: the validation must have turned before the onset, and even then it speaks softly.

    Thresholds: Prechelt's criteria (science.md 5); 5 % above the best is clear. Double descent and better calibrated accuracy exist, so this
    says that the gap grows, not that training is over.

    To do: stop at the best epoch and take its weights; regularise, or get more data.
    """

    id: ClassVar = "overfitting"
    family: ClassVar = Family.GENERALIZATION
    title: ClassVar = "Overfitting"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.OVERFIT}

    @override
    def examine(self, case: Case) -> Examination:
        found = _finding(case)
        points = _curve(case, found)
        if found is None and (case.kind is not EpisodeKind.OVERFIT or len(points) < LEAST_VALIDATIONS):
            return Examination(evidence=_nothing(case))
        best = min(points, key=lambda p: p.value, default=None)
        evidence = without_none(_gap(case, found), _rise(case, points, best), _training(case, points, best))
        return Examination(
            evidence=evidence,
            summary=_summary(points, best),
            fixes=_fixes(points, best),
            change=None if best is None else Change(setting="max_steps", value=float(best.at.step)),
        )


def _finding(case: Case) -> Finding | None:
    """`gap_growing`: of this episode, or from before the onset of a spike."""
    last = case.last if case.kind is EpisodeKind.OVERFIT else case.onset
    found = case.findings("overfit", "gap_growing", first=0, last=last)
    return found[-1] if found else None


def _curve(case: Case, found: Finding | None) -> list[ValidationPoint]:
    """The validation curve in question, up to the end of the run or the onset of a spike; finite points only."""
    metric = found.detail.get("metric") if found is not None else case.episode.signal
    known = {p.metric for p in case.store.validations}
    named = metric if isinstance(metric, str) and metric in known else next(iter(sorted(known)), None)
    last = None if case.kind is EpisodeKind.OVERFIT else case.onset
    points = [p for p in case.store.validations if p.metric == named and number(p.value) is not None]
    return [p for p in points if last is None or p.at.ordinal <= last]


def _nothing(case: Case) -> tuple[Evidence, ...]:
    if case.kind is EpisodeKind.OVERFIT or len(case.store.validations) < LEAST_VALIDATIONS:
        return ()
    return (tell("val_loss", "The validation loss had not turned up before.", -FAIR, step=case.step),)


def _gap(case: Case, found: Finding | None) -> Evidence | None:
    if found is None:
        return None
    gap, above, up = (number(found.detail.get(key)) for key in ("gap", "gl", "up"))
    words = f"The gap between validation and training loss was growing by step {found.at.step}"
    more = f": the validation loss {above:.3g} % above its best" if above is not None else ""
    rises = f", up {up:.0f} validations in a row" if up is not None else ""
    weight = STRONG if case.kind is EpisodeKind.OVERFIT else SLIGHT
    return tell("val_loss", f"{words}{more}{rises}.", weight, step=found.at.step, observed=gap)


def _rise(case: Case, points: list[ValidationPoint], best: ValidationPoint | None) -> Evidence | None:
    if best is None or len(points) < LEAST_VALIDATIONS or not best.value > 0.0:
        return None
    now = points[-1]
    share = now.value / best.value - 1.0
    text = f"{now.metric} is {now.value:.3g}, its best was {best.value:.3g} in epoch {best.at.epoch}."
    if case.kind is not EpisodeKind.OVERFIT:
        weight = 0.0
    else:
        weight = STRONG if share >= CLEAR_RISE else SLIGHT if share > 0.0 else -STRONG
    return tell(now.metric, text, weight, step=now.at.step, observed=now.value, expected=best.value)


def _training(case: Case, points: list[ValidationPoint], best: ValidationPoint | None) -> Evidence | None:
    """Whether the training loss went on falling after the best validation."""
    if best is None or best.train_loss is None or not points or points[-1].train_loss is None:
        return None
    then, now = best.train_loss, points[-1].train_loss
    falling = now < then
    text = f"Meanwhile the training loss went from {then:.3g} to {now:.3g}."
    weight = (FAIR if case.kind is EpisodeKind.OVERFIT else 0.0) if falling else -DECISIVE
    return tell("loss", text, weight, step=points[-1].at.step, observed=number(now), expected=number(then))


def _summary(points: list[ValidationPoint], best: ValidationPoint | None) -> str:
    if best is None or not points:
        return "The validation loss turned up while the training loss went on falling."
    now = points[-1]
    return f"{now.metric} was best in epoch {best.at.epoch} ({best.value:.3g}) and has risen to {now.value:.3g} by epoch {now.at.epoch} while the training loss fell."


def _fixes(points: list[ValidationPoint], best: ValidationPoint | None) -> tuple[str, ...]:
    more = "Regularise before training longer: weight decay, dropout, augmentation, or more training data."
    if best is None or not points:
        return ("Stop at the best epoch: OverfitWatcher(stop=True, restore_best=True).", more)
    return (
        (
            f"Stop at epoch {best.at.epoch} (step {best.at.step}), where {best.metric} was best, and take those weights: OverfitWatcher(stop=True, restore_best=True), "
            f"or EarlyStopping(monitor={best.metric!r}, mode='min', patience={PATIENCE})."
        ),
        more,
    )
