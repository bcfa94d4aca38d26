"""Observers of batch, loss and gradient norm that several causes share."""

import math
from collections.abc import Iterator
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.batch_ranges import GUARD, NEAR
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.rates import RateEvent, event_level, steady_rate
from lightning_spike.diagnosis.view import EpisodeView, Excess

VANISHED_FACTOR: Final = 30.0
"""Factor below its usual norm from which a gradient has vanished: batches of one run differ by far less;
engineering choice."""
FAR_VANISHED_FACTOR: Final = 1000.0
"""The same factor in a run whose norms are too unsteady for a range (AUTOTRAINER's ratio)."""
LARGE_GRADIENT_FACTOR: Final = 3.0
"""Multiple of its usual norm from which a gradient is large, as an outlier in the batch may cause;
engineering choice."""
CLEARLY_ODD: Final = 2.0
"""Factor between a batch's value and its usual one from which the batch is odd: harmless augmentation stays below
(decoys of ×1.5, science.md 2b.6)."""
JUMP_LEVELS: Final = ((100.0, "100-fold"), (20.0, "20-fold"), (5.0, "5-fold"), (2.0, "2-fold"))
"""Factors between one loss and the next, by level."""


def finite(value: float | None) -> float | None:
    """The value if it is finite, else `None`."""
    return value if value is not None and math.isfinite(value) else None


def batches(count: int) -> str:
    """`"one batch"`, `"4 batches"`."""
    return "one batch" if count == 1 else f"{count} batches"


def before_rise(lag: int) -> str:
    """`", 4 batches before the loss rose"`, or `", as the loss rose"`."""
    return f", {batches(lag)} before the loss rose" if lag > 0 else ", as the loss rose"


def rate_text(event: RateEvent) -> str:
    """What the rate did, and how soon the loss rose."""
    factor = "" if event.factor is None else f" ({sentences.times(event.factor)})"
    return f"{event.text}{factor}{before_rise(event.lag)}"


@observer("ordinary", "odd")
def batch_values(view: EpisodeView) -> Observation | None:
    """Whether the values of the batch are in their usual range; `None` where they were not recorded."""
    if not view.batch_is_known:
        return None
    odd = [o for at in view.suspect_batches for o in view.oddities(at) if o.excess.ratio >= CLEARLY_ODD]
    if not odd:
        text = f"The values of the batch at step {view.step} are in their usual range."
        return Observation(text, level="ordinary", signal="batch")
    worst, seen, usual = odd[0], odd[0].excess.observed, odd[0].excess.expected
    values = f"{worst.statistic} of '{worst.leaf}' is {seen:.3g}, usually {usual:.3g}"
    text = f"The batch at step {view.step} is unusual: {values}."
    return Observation(text, level="odd", signal=worst.signal, observed=seen, expected=usual)


@observer("transient")
def transient_loss(view: EpisodeView) -> Observation | None:
    """The loss recovered at once, so the weights were not damaged."""
    if not view.transient:
        return None
    length = batches(view.last - view.onset + 1)
    text = f"The loss left its range for {length} and recovered at once, so the weights were not damaged."
    return Observation(text, observed=finite(view.episode.loss_peak), expected=view.episode.loss_before)


@observer("less than 2-fold", "2-fold", "5-fold", "20-fold", "100-fold")
def jump_after_ordinary_updates(view: EpisodeView) -> Observation | None:
    """The loss jumped from one batch to the next after ordinary updates: the batch is the cause, not a step.

    A step shows first in the loss of the next batch, and steps of one size change the loss by similar amounts. So a
    jump by k after an ordinary step has a likelihood of about 1 / k (a heavy tail). `None` where the rise was gradual,
    where rates or gradient norms are unknown or out of range, and where a replay found the weights at fault.
    """
    before, first = view.episode.loss_before, view.at_onset(view.episode.signal)
    if not view.sudden or before is None or first is None or view.split is SplitVerdict.WEIGHTS:
        return None
    if not ordinary_updates(view):
        return None
    ratio = first / before if math.isfinite(first) else math.inf
    level = next((name for factor, name in JUMP_LEVELS if ratio >= factor), "less than 2-fold")
    became = f"rose by a factor of {ratio:.2g}" if math.isfinite(ratio) else "became non-finite"
    text = f"The loss {became} from one batch to the next, after updates with ordinary learning rates and gradients."
    return Observation(text, level=level, observed=finite(first), expected=before)


def ordinary_updates(view: EpisodeView) -> bool:
    """Whether rates, gradient norms and (where measured) update sizes before the onset are known and in range."""
    if not steady_rate(view) or view.latest("grad_norm", view.onset - 1) is None or early_gradient(view) is not None:
        return False
    size = view.worst("update_norm", view.onset - NEAR, view.onset - 1)
    known = any(gradient_norms(view, view.onset - GUARD, view.onset - 1))
    return known and (size is None or not size.above)


def early_gradient(view: EpisodeView) -> Excess | None:
    """The highest gradient norm just before the onset, if out of range; `None` where all were in range."""
    found = [e for e in gradient_norms(view, view.onset - GUARD, view.onset - 1) if e.above]
    return max(found, key=lambda e: e.ratio, default=None)


@observer("vanished", signal="grad_norm")
def gradient_vanished_before(view: EpisodeView) -> Observation | None:
    """The gradient norms just before the onset were a small fraction of the usual: such steps do no harm."""
    recent = list(gradient_norms(view, view.onset - NEAR // 2, view.onset - 1))
    fell = (e.z < 0.0 and e.ratio >= (VANISHED_FACTOR if e.odd else FAR_VANISHED_FACTOR) for e in recent)
    if not recent or not all(fell):
        return None
    least = min(recent, key=lambda e: e.z)
    text = f"The gradient norm had fallen to {least.observed:.3g} just before, usually {least.expected:.3g}."
    return Observation(text, observed=least.observed, expected=least.expected)


@observer("in range", signal="grad_norm")
def gradient_in_range(view: EpisodeView) -> Observation | None:
    """The gradient norms of the updates just before the onset were ordinary."""
    recent = list(gradient_norms(view, view.onset - NEAR, view.onset - 1))
    if not recent or any(e.above for e in recent) or gradient_vanished_before(view) is not None:
        return None
    highest = max(recent, key=lambda e: e.z)
    values = f"{highest.observed:.3g}, usually {highest.expected:.3g}"
    text = f"The gradient norm was in its range up to the batch before: {values}."
    return Observation(text, observed=highest.observed, expected=highest.expected)


def gradient_norms(view: EpisodeView, first: int, last: int) -> Iterator[Excess]:
    """The gradient norms of the batches `first` to `last` against healthy ones; unknown norms are left out."""
    excesses = (view.excess("grad_norm", ordinal) for ordinal in range(max(first, 0), last + 1))
    return (e for e in excesses if e is not None)


def event_observation(view: EpisodeView, event: RateEvent, text: str) -> Observation:
    """An observation of an event of the learning rate, by its distance to the onset."""
    level, after = event_level(view, event), finite(event.after)
    return Observation(text, level=level, signal=event.signal, step=event.step, observed=after, expected=event.before)
