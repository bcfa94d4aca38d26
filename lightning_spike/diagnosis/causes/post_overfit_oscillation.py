"""`post_overfit_oscillation`.

Training goes on after it has overfitted: the loss is near its floor, and every small change of the data makes it swing,
wider and wider.

Seen by: a validation loss above its best before the trouble began; a training loss far below it; the same few batches
over and over, which the model knows by heart, and which keep their low loss where altered ones have a high one; a loss
that rises and comes back several times.

Against it: a validation loss at its best, or too few validations, where the batches are new (without either there is no
overfitting to be seen, science.md 5); a high loss of the very batches that are known by heart (then the weights are at
fault); a single rise.

Thresholds: 5 % above the best validation is a clear rise (Prechelt 1998, GL of 5); a swing is a loss that rose 60 % of
the way to the highest one, on the log scale, and came 60 % of it
back; `observations.repeats` says what counts as the same few batches.

To do: stop at the best validation and take its weights; odd batches only show the trouble.
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.observations.upstream import rate_upstream
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, ValidationPoint, number

MIN_VALIDATIONS: Final = 3
"""Validations below which a curve says nothing; engineering choice."""
CLEAR_RISE: Final = 0.05
"""Share by which the validation loss must be above its best: Prechelt's GL of 5 (1998), as in `overfitting`."""
MIN_VALIDATIONS_ABOVE: Final = 2
"""Validations that must lie so far above it: a single one may do so by chance; engineering choice."""
WIDE_GAP: Final = 1.5
"""Validation loss over training loss just before the onset from which the training set is known by heart (SMD's rule is
1.1, which healthy nets with dropout reach); engineering choice."""
MIN_SWING: Final = 2.0
"""Times the level before it that the loss must reach in its swings; engineering choice."""
UP_SHARE: Final = 0.6
"""Share of the way from that level to the highest loss, on the log scale, that is up; engineering choice …"""
BACK_SHARE: Final = 0.4
"""… and that is back."""
MIN_SWINGS: Final = 3
"""Swings up and back that make an oscillation; engineering choice."""
BATCHES_AFTER: Final = 160
"""Batches after the onset in which they are counted; engineering choice."""
APART: Final = 1.25
"""Factor between the losses of altered batches and of repeated ones from which the alteration is the reason;
engineering choice."""
DOWN_STEP: Final = -2
"""Difference of states from up (1) to back (-1)."""


@observer("too few validations", "repeatedly above best", "above best", "at best", "at best, repeated batches")
def validation_above_best(view: EpisodeView) -> Observation | None:
    """A validation loss at its best speaks against it, but not where few batches came so often.

    Learning by heart may still help the validation a little.
    """
    points, repeated = view.once(_curve), view.once(repeats) is not None
    best = _best(points)
    if best is None or len(points) < MIN_VALIDATIONS or not best.value > 0.0:
        if repeated:
            return None
        text = "There are too few validations before it to call this overfitting."
        return Observation(level="too few validations", text=text, signal="val_loss", step=view.step)
    now = points[-1]
    above = [p for p in points[points.index(best) + 1 :] if p.value >= (1.0 + CLEAR_RISE) * best.value]
    level = "at best, repeated batches" if repeated else "at best"
    if now.value / best.value - 1.0 >= CLEAR_RISE:
        level = "repeatedly above best" if len(above) >= MIN_VALIDATIONS_ABOVE else "above best"
    text = (
        f"Before the loss rose, {now.metric} was {now.value:.3g} at step {now.at.step}; "
        f"its best was {best.value:.3g} at step {best.at.step}."
    )
    return Observation(
        level=level, text=text, signal=now.metric, step=now.at.step, observed=now.value, expected=best.value
    )


@observer("wide", "narrow", "narrow, repeated batches")
def gap(view: EpisodeView) -> Observation | None:
    """Validation loss over training loss just before the onset."""
    before, points = view.episode.loss_before, view.once(_curve)
    if before is None or not points:
        return None
    value = points[-1].value
    level = "narrow" if view.once(repeats) is None else "narrow, repeated batches"
    if before * WIDE_GAP <= value:
        level = "wide"
    text = f"The training loss was {before:.3g} then, the validation loss {value:.3g}."
    return Observation(level=level, text=text, signal="loss", step=view.step, observed=before, expected=value)


@observer("repeated")
def repeated_batches(view: EpisodeView) -> Observation | None:
    """The same few batches over and over."""
    found = view.once(repeats)
    if found is None:
        return None
    text = f"{found.came} of the {found.window} batches before were the same {found.kinds} repeated."
    return Observation(
        level="repeated",
        text=text,
        signal="batch",
        step=view.step,
        observed=float(found.kinds),
        expected=float(found.window),
    )


@observer("altered batches are high", "repeated batches are high")
def altered_batches(view: EpisodeView) -> Observation | None:
    """Which batches have the high loss.

    Altered ones, as of a model that knows the others by heart, or those as well.
    """
    found = view.once(repeats)
    if found is None or found.known is None:
        return None
    if found.altered is None:
        if found.known < MIN_SWING:
            return None
        text = f"The repeated batches have ×{found.known:.2g} their earlier loss."
        return Observation(
            level="repeated batches are high",
            text=text,
            signal="loss",
            step=view.step,
            observed=found.known,
            expected=1.0,
        )
    apart = found.altered >= APART * found.known
    text = f"Since then repeated batches have ×{found.known:.2g} the earlier loss, others ×{found.altered:.2g}."
    return Observation(
        level="altered batches are high" if apart else "repeated batches are high", text=text, signal="loss",
        step=view.step, observed=found.altered, expected=found.known,
    )  # fmt: skip


@observer("swings", "single rise")
def swings(view: EpisodeView) -> Observation | None:
    """How often the loss rose and came back to its level."""
    before, signal = view.episode.loss_before, view.episode.signal
    losses = view.store.history.between(signal, view.onset, view.onset + BATCHES_AFTER)
    losses = losses[np.isfinite(losses)]
    if before is None or not before > 0.0 or losses.size == 0 or not float(losses.max()) >= MIN_SWING * before:
        return None
    count = _swings_in(losses, before)
    found = view.findings("overfit", "widening_swings", first=0, last=max(view.last, view.onset + BATCHES_AFTER))
    text = f"The loss rose to as much as {losses.max():.3g} and came back {count} times in {losses.size} batches."
    level = "swings" if found or count >= MIN_SWINGS else "single rise"
    return Observation(level=level, text=text, signal=signal, step=view.step, observed=float(count), expected=0.0)


def _swings_in(losses: "np.typing.NDArray[np.float64]", before: float) -> int:
    start = math.log(before)  # logs apart: the ratio of two losses of any size may overflow
    place = (np.log(np.maximum(losses, before)) - start) / (math.log(float(losses.max())) - start)
    state = np.select([place >= UP_SHARE, place <= BACK_SHARE], [1, -1], 0)
    return int((np.diff(state[state != 0]) == DOWN_STEP).sum())


def _curve(view: EpisodeView) -> list[ValidationPoint]:
    """The validations up to the onset, of the metric that comes first by name; finite ones only."""
    names = sorted({p.metric for p in view.store.validations})
    points = [p for p in view.store.validations if p.metric in names[:1] and number(p.value) is not None]
    return [p for p in points if p.at.ordinal < view.onset - GUARD]


def _best(points: list[ValidationPoint]) -> ValidationPoint | None:
    return min(points, key=lambda p: p.value, default=None)


def _summary(view: EpisodeView) -> str:
    points, found = view.once(_curve), view.once(repeats)
    best = _best(points)
    if found is not None:
        return f"The model knows the same {found.kinds} repeated batches by heart, and every altered one makes the loss swing: {view.loss_text}."
    if best is None:
        return f"The training swings after it has overfitted: {view.loss_text}."
    now = points[-1]
    values = f"step {best.at.step}, {best.value:.3g}; {now.value:.3g} by step {now.at.step}"
    return f"Training went on after {now.metric} was best ({values}), and now every odd batch makes the loss swing: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    more = Fix("If training must go on: more data, augmentation from the start, weight decay or dropout.")
    best = _best(view.once(_curve))
    if best is None:
        return (Fix("Stop at the best validation: OverfitWatcher(stop=True, restore_best=True)."), more)
    text = (
        f"Stop at step {best.at.step}, where {best.metric} was best ({best.value:.3g}), and take those weights: "
        "OverfitWatcher(stop=True, restore_best=True)."
    )
    return (Fix(text, Change(setting="max_steps", value=best.at.step)), more)


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
