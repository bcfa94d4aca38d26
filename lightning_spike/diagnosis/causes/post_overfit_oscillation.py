"""`post_overfit_oscillation`: the run goes on after overfitting: the training loss swings ever wider.

The loss is near its floor, and every small change of the data makes it swing.

Seen by: a validation loss above its best before the onset; a training loss far below it; the same few batches over and
over, which the model memorised, and which keep their low loss where altered ones have a high one; a loss that rises and
recovers several times.

Against it: a validation loss at its best, or too few validations, where the batches are new (then overfitting cannot be
seen, science.md 5); a high loss of the memorised batches themselves (then the weights are at fault); a single rise.

Thresholds: 5 % above the best validation is a clear rise (Prechelt 1998, GL of 5); a swing is a loss that rose 60 % of
the way to the highest one, on the log scale, and fell by 60 % of it; `observations.repeats` defines the same few
batches.

To do: stop at the best validation and take its weights; odd batches only show the problem.
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.observations.upstream import rate_upstream
from lightning_spike.diagnosis.observations.validation import CLEAR_RISE, best_of, curve_of
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, ValidationPoint

MIN_VALIDATIONS: Final = 3
"""Validations without which a curve says nothing; engineering choice."""
MIN_VALIDATIONS_ABOVE: Final = 2
"""Validations that must be clearly above the best: a single one may be chance; engineering choice."""
WIDE_GAP: Final = 1.5
"""Validation loss over training loss just before the onset from which the training set is memorised (SMD's rule is 1.1,
which healthy nets with dropout reach); engineering choice."""
MIN_SWING: Final = 2.0
"""Multiple of the level before that the loss must reach in its swings; engineering choice."""
UP_SHARE: Final = 0.6
"""Share of the way from that level to the highest loss, on the log scale, from which it is up; engineering choice."""
BACK_SHARE: Final = 0.4
"""Share of that way below which it is back; engineering choice."""
MIN_SWINGS: Final = 3
"""Swings up and back that make an oscillation; engineering choice."""
BATCHES_AFTER: Final = 160
"""Batches after the onset in which swings are counted; engineering choice."""
APART_FACTOR: Final = 1.25
"""Factor between the losses of altered and repeated batches from which the alteration is the cause;
engineering choice."""
DOWN_STEP: Final = -2
"""Difference of states from up (1) to back (-1), by definition."""


@observer("too few validations", "repeatedly above best", "above best", "at best", "at best, repeated batches")
def validation_above_best(view: EpisodeView) -> Observation | None:
    """The newest validation against the best one; memorising few batches may still improve the validation a little."""
    points, repeated = view.once(_curve), view.once(repeats) is not None
    best = best_of(points)
    if best is None or len(points) < MIN_VALIDATIONS or not best.value > 0.0:
        text = "There are too few validations before it to call this overfitting."
        return None if repeated else Observation(text, level="too few validations", signal="val_loss")
    now = points[-1]
    above = [p for p in points[points.index(best) + 1 :] if p.value >= (1.0 + CLEAR_RISE) * best.value]
    level = "at best, repeated batches" if repeated else "at best"
    if now.value / best.value - 1.0 >= CLEAR_RISE:
        level = "repeatedly above best" if len(above) >= MIN_VALIDATIONS_ABOVE else "above best"
    text = (
        f"Before the loss rose, {now.metric} was {now.value:.3g} at step {now.at.step}; "
        f"its best was {best.value:.3g} at step {best.at.step}."
    )
    return Observation(text, level=level, signal=now.metric, step=now.at.step, observed=now.value, expected=best.value)


@observer("wide", "narrow", "narrow, repeated batches", signal="loss")
def gap(view: EpisodeView) -> Observation | None:
    """Validation loss over training loss just before the onset."""
    before, points = view.episode.loss_before, view.once(_curve)
    if before is None or not points:
        return None
    value = points[-1].value
    level = "narrow" if view.once(repeats) is None else "narrow, repeated batches"
    level = "wide" if before * WIDE_GAP <= value else level
    text = f"The training loss was {before:.3g} then, the validation loss {value:.3g}."
    return Observation(text, level=level, observed=before, expected=value)


@observer("repeated", signal="batch")
def repeated_batches(view: EpisodeView) -> Observation | None:
    """The same few batches over and over."""
    found = view.once(repeats)
    if found is None:
        return None
    return Observation(f"{found.text}.", observed=float(found.kinds), expected=float(found.window))


@observer("altered batches are high", "repeated batches are high", signal="loss")
def altered_batches(view: EpisodeView) -> Observation | None:
    """Whether altered batches have the high loss, as for a memorising model, or the repeated ones too."""
    found = view.once(repeats)
    if found is None or found.known is None:
        return None
    if found.altered is None:
        text = f"The repeated batches have {sentences.times(found.known)} their earlier loss."
        is_high, level = found.known >= MIN_SWING, "repeated batches are high"
        return Observation(text, level=level, observed=found.known, expected=1.0) if is_high else None
    apart = found.altered >= APART_FACTOR * found.known
    level = "altered batches are high" if apart else "repeated batches are high"
    known, altered = sentences.times(found.known), sentences.times(found.altered)
    text = f"Since then repeated batches have {known} the earlier loss, others {altered}."
    return Observation(text, level=level, observed=found.altered, expected=found.known)


@observer("swings", "single rise")
def swings(view: EpisodeView) -> Observation | None:
    """How often the loss rose and fell back to its level."""
    before, last = view.episode.loss_before, view.onset + BATCHES_AFTER
    losses = view.store.history.between(view.episode.signal, view.onset, last)
    losses = losses[np.isfinite(losses)]
    if before is None or not before > 0.0 or losses.size == 0 or not float(losses.max()) >= MIN_SWING * before:
        return None
    count = _swings_in(losses, before)
    found = view.findings("overfit", "widening_swings", first=0, last=max(view.last, last))
    text = f"The loss rose to as much as {losses.max():.3g} and came back {count} times in {losses.size} batches."
    level = "swings" if found or count >= MIN_SWINGS else "single rise"
    return Observation(text, level=level, observed=float(count), expected=0.0)


def _swings_in(losses: "np.typing.NDArray[np.float64]", before: float) -> int:
    start = math.log(before)  # logs apart: the ratio of two losses of any size may overflow
    place = (np.log(np.maximum(losses, before)) - start) / (math.log(float(losses.max())) - start)
    state = np.select([place >= UP_SHARE, place <= BACK_SHARE], [1, -1], 0)
    return int((np.diff(state[state != 0]) == DOWN_STEP).sum())


def _curve(view: EpisodeView) -> list[ValidationPoint]:
    """The validations of the first metric by name, up to some batches before the onset."""
    return [p for p in curve_of(view) if p.at.ordinal < view.onset - GUARD]


def _summary(view: EpisodeView) -> str:
    points, found = view.once(_curve), view.once(repeats)
    best = best_of(points)
    if found is not None:
        known = f"The model memorised the same {found.kinds} repeated batches"
        return f"{known}, and every altered one makes the loss swing: {view.loss_text}."
    if best is None:
        return f"The training loss swings after overfitting: {view.loss_text}."
    now = points[-1]
    values = f"step {best.at.step}, {best.value:.3g}; {now.value:.3g} by step {now.at.step}"
    went_on = f"Training went on after {now.metric} was best ({values})"
    return f"{went_on}, and now every odd batch makes the loss swing: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    more = Fix("If training must go on: more data, augmentation from the start, weight decay or dropout.")
    best, stop = best_of(view.once(_curve)), "OverfitWatcher(stop=True, restore_best=True)"
    if best is None:
        return (Fix(f"Stop at the best validation: {stop}."), more)
    where = f"Stop at step {best.at.step}, where {best.metric} was best ({best.value:.3g})"
    return Fix(f"{where}, and take those weights: {stop}.", Change(setting="max_steps", value=best.at.step)), more


CAUSE: Final = Cause(
    id="post_overfit_oscillation",
    family=Family.GENERALIZATION,
    title="Swings after overfitting",
    meaning="the run goes on after overfitting: training loss swings ever wider",
    observations=(validation_above_best, gap, repeated_batches, altered_batches, swings, rate_upstream),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE - {EpisodeKind.NONFINITE},
    explains=frozenset({"overfitting", "bad_batch", "data_drift", "label_noise"}),
)
