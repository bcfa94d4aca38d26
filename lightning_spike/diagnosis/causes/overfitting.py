"""`overfitting`: training loss falls while validation loss rises: the model memorises its training set.

Seen by: the finding `gap_growing` (the smoothed validation loss has risen in several validations in a row while the
training loss went on falling) and the validation curve itself.

Against it: a training loss that rose as well (then something affected both); too few validations. A spike of the
*training* loss is never called overfitting alone: the validation must have turned before the onset, and even then it
weighs little.

Thresholds: Prechelt's criteria (science.md 5); 5 % above the best is clear. Double descent and better calibrated
accuracy exist, so this says that the gap grows, not that training is over.

To do: stop at the best epoch and take its weights; regularise, or get more data.
"""

from typing import Final

from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.validation import CLEAR_RISE, best_of, curve_of
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding, ValidationPoint, number

MIN_VALIDATIONS: Final = 4
"""Validations without which a curve says nothing; engineering choice."""
PATIENCE: Final = 5
"""Validations without a new best after which to stop: patience >= 3 to 5 (science.md 5)."""


@observer("had not turned", "too few validations", signal="val_loss")
def validation_turned(view: EpisodeView) -> Observation | None:
    """The premise: the finding, or an episode of overfitting with enough validations."""
    is_overfit = view.kind is EpisodeKind.OVERFIT
    if view.once(_finding) is not None or (is_overfit and len(view.once(_curve)) >= MIN_VALIDATIONS):
        return None
    if is_overfit or len(view.store.validations) < MIN_VALIDATIONS:
        return Observation("There are too few validations to tell.", level="too few validations")
    return Observation("The validation loss had not risen before.", level="had not turned")


@observer("grows", "grew before a spike", signal="val_loss")
def growing_gap(view: EpisodeView) -> Observation | None:
    """The gap between validation and training loss."""
    found = view.once(_finding)
    if found is None:
        return None
    above, rises = found.number("gl"), found.number("up")
    text = f"The gap between validation and training loss was growing by step {found.at.step}"
    text += "" if above is None else f": the validation loss {above:.3g} % above its best"
    text += "" if rises is None else f", up {rises:.0f} validations in a row"
    level = "grows" if view.kind is EpisodeKind.OVERFIT else "grew before a spike"
    return Observation(f"{text}.", level=level, step=found.at.step, observed=found.number("gap"))


@observer("clearly above best", "above best", "at best", "before a spike")
def validation_rise(view: EpisodeView) -> Observation | None:
    """The newest validation against the best one."""
    points = view.once(_curve)
    best = best_of(points)
    if best is None or len(points) < MIN_VALIDATIONS or not best.value > 0.0:
        return None
    now = points[-1]
    level = _rise_level(now.value / best.value - 1.0) if view.kind is EpisodeKind.OVERFIT else "before a spike"
    text = f"{now.metric} is {now.value:.3g}, its best was {best.value:.3g} in epoch {best.at.epoch}."
    return Observation(text, level=level, signal=now.metric, step=now.at.step, observed=now.value, expected=best.value)


def _rise_level(share: float) -> str:
    if share >= CLEAR_RISE:
        return "clearly above best"
    return "above best" if share > 0.0 else "at best"


@observer("falls", "falls before a spike", "rises", signal="loss")
def training_loss(view: EpisodeView) -> Observation | None:
    """Whether the training loss went on falling after the best validation."""
    points = view.once(_curve)
    best = best_of(points)
    if best is None or best.train_loss is None or points[-1].train_loss is None:
        return None
    then, now = best.train_loss, points[-1].train_loss
    level = "falls" if view.kind is EpisodeKind.OVERFIT else "falls before a spike"
    level = level if now < then else "rises"
    text = f"Meanwhile the training loss went from {then:.3g} to {now:.3g}."
    return Observation(text, level=level, step=points[-1].at.step, observed=number(now), expected=number(then))


def _finding(view: EpisodeView) -> Finding | None:
    """The finding `gap_growing` of this episode, or from before the onset of a spike."""
    last = view.last if view.kind is EpisodeKind.OVERFIT else view.onset
    found = view.findings("overfit", "gap_growing", first=0, last=last)
    return found[-1] if found else None


def _curve(view: EpisodeView) -> list[ValidationPoint]:
    """The validation curve of the episode's metric, up to the end of the run or the onset of a spike."""
    found = view.once(_finding)
    points = curve_of(view, view.episode.signal if found is None else found.detail.get("metric"))
    return [p for p in points if view.kind is EpisodeKind.OVERFIT or p.at.ordinal <= view.onset]


def _summary(view: EpisodeView) -> str:
    points = view.once(_curve)
    best = best_of(points)
    if best is None:
        return "The validation loss rose while the training loss went on falling."
    now = points[-1]
    return (
        f"{now.metric} was best in epoch {best.at.epoch} ({best.value:.3g}) and rose to {now.value:.3g} "
        f"by epoch {now.at.epoch} while the training loss fell."
    )


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    more = Fix("Regularise before training longer: weight decay, dropout, augmentation, or more training data.")
    best = best_of(view.once(_curve))
    if best is None:
        return (Fix("Stop at the best epoch: OverfitWatcher(stop=True, restore_best=True)."), more)
    stopping = f"EarlyStopping(monitor={best.metric!r}, mode='min', patience={PATIENCE})"
    text = (
        f"Stop at epoch {best.at.epoch} (step {best.at.step}), where {best.metric} was best, and take those weights: "
        f"OverfitWatcher(stop=True, restore_best=True), or {stopping}."
    )
    return (Fix(text, Change(setting="max_steps", value=float(best.at.step))), more)


CAUSE: Final = Cause(
    id="overfitting",
    family=Family.GENERALIZATION,
    title="Overfitting",
    meaning="training loss falls while validation loss rises",
    requires=(validation_turned,),
    observations=(growing_gap, validation_rise, training_loss),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.OVERFIT},
)
