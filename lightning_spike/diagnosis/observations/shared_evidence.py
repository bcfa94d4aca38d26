"""Observers about batch, loss and gradient norm that several causes share; each puts one fact into words once."""

import math
from collections.abc import Iterator
from typing import Final

from lightning_spike.diagnosis.constants import GUARD, NEAR
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.rates import RateEvent, steady_rate
from lightning_spike.diagnosis.view import EpisodeView, Excess

VANISHED: Final = 30.0
"""Times below its usual norm from which a gradient has all but vanished: batches of one run differ by far less;
engineering choice."""
FAR_VANISHED: Final = 1000.0
"""… and from which it has in a run whose norms are not steady enough to tell by their range (AUTOTRAINER's ratio)."""
CLEARLY_ODD: Final = 2.0
"""Factor between a batch's value and its expectation below which it may well be chance or harmless; engineering
choice."""
JUMP_LEVELS: Final = ((100.0, "100-fold"), (20.0, "20-fold"), (5.0, "5-fold"), (2.0, "2-fold"))
"""Factors between one loss and the next, by level."""


def finite(value: float | None) -> float | None:
    """The value where there is one and it is finite, else `None`."""
    return value if value is not None and math.isfinite(value) else None


def rate_text(event: RateEvent) -> str:
    """What the rate did, and how soon the loss followed."""
    factor = "" if event.factor is None else f" (×{event.factor:.3g})"
    if event.lag <= 0:
        return f"{event.text}{factor}, as the loss rose"
    return f"{event.text}{factor}, {batches(event.lag)} before the loss rose"


def batches(count: int) -> str:
    """`"one batch"`, `"4 batches"`."""
    return "one batch" if count == 1 else f"{count} batches"


@observer("ordinary", "odd")
def batch_values(view: EpisodeView) -> Observation | None:
    """Whether the values of the batch at the onset are like those of the batches before; `None` where they were not recorded."""
    if not view.batch_is_known:
        return None
    clearly = [o for at in view.suspect_batches for o in view.oddities(at) if o.excess.ratio >= CLEARLY_ODD]
    if not clearly:
        text = f"The values of the batch at step {view.step} are in their usual range."
        return Observation(level="ordinary", text=text, signal="batch", step=view.step)
    worst = clearly[0]
    text = (
        f"The batch at step {view.step} is unusual: {worst.statistic} of '{worst.leaf}' is {worst.excess.observed:.3g}, "
        f"usually {worst.excess.expected:.3g}."
    )
    return Observation(
        level="odd",
        text=text,
        signal=worst.signal,
        step=view.step,
        observed=worst.excess.observed,
        expected=worst.excess.expected,
    )


@observer("transient")
def transient_loss(view: EpisodeView) -> Observation | None:
    """The loss was back at once: no lasting damage to the weights."""
    if not view.transient:
        return None
    text = f"The loss left its range for {batches(view.last - view.onset + 1)} and came back at once, so the weights were not damaged."
    return Observation(
        level="transient", text=text, signal=view.episode.signal, step=view.step,
        observed=finite(view.episode.loss_peak), expected=view.episode.loss_before,
    )  # fmt: skip


@observer("less than 2-fold", "2-fold", "5-fold", "20-fold", "100-fold")
def jump_after_ordinary_updates(view: EpisodeView) -> Observation | None:
    """The loss jumped from one batch to the next after ordinary updates: the cause is in that batch, not in a step.

    What a step does first shows in the loss of the next batch, and steps of one size change the loss by alike amounts:
    that an ordinary one multiplies it by k is the less likely the larger k, taken as 1 / k (a heavy tail; a normal one
    would be surer). `None` where the rise was gradual, where rates or gradient norms are not known or had
    left their range, and where a replay has found the weights at fault: that is measured, this only inferred.
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
    return Observation(
        level=level, text=text, signal=view.episode.signal, step=view.step, observed=finite(first), expected=before
    )


def ordinary_updates(view: EpisodeView) -> bool:
    """Whether learning rates, gradient norms and, where measured, the sizes of the updates before the onset are known and in their range."""
    if not steady_rate(view) or view.latest("grad_norm", view.onset - 1) is None or early_gradient(view) is not None:
        return False
    known = any(view.excess("grad_norm", ordinal) is not None for ordinal in range(view.onset - GUARD, view.onset))
    size = view.worst("update_norm", view.onset - NEAR, view.onset - 1)
    return known and (size is None or not size.above)


def early_gradient(view: EpisodeView) -> Excess | None:
    """The highest gradient norm of the updates just before the onset, if it was out of its range: it led the loss."""
    found = [e for e in gradient_norms(view, view.onset - GUARD, view.onset - 1) if e.above]
    return max(found, key=lambda e: e.ratio, default=None)


@observer("vanished")
def gradient_vanished_before(view: EpisodeView) -> Observation | None:
    """The gradient norms just before the onset were a small fraction of the usual.

    Such steps do no harm by their own length.
    """
    recent = list(gradient_norms(view, view.onset - NEAR // 2, view.onset - 1))
    if not recent or not all(e.z < 0.0 and e.ratio >= (VANISHED if e.odd else FAR_VANISHED) for e in recent):
        return None
    least = min(recent, key=lambda e: e.z)
    text = f"The gradient norm had fallen to {least.observed:.3g} just before, usually {least.expected:.3g}."
    return Observation(
        level="vanished",
        text=text,
        signal="grad_norm",
        step=view.step,
        observed=least.observed,
        expected=least.expected,
    )


@observer("in range")
def gradient_in_range(view: EpisodeView) -> Observation | None:
    """The gradient norms of the updates just before the onset were ordinary."""
    recent = list(gradient_norms(view, view.onset - NEAR, view.onset - 1))
    if not recent or any(e.above for e in recent) or gradient_vanished_before(view) is not None:
        return None
    highest = max(recent, key=lambda e: e.z)
    text = f"The gradient norm was in its range up to the batch before: {highest.observed:.3g}, usually {highest.expected:.3g}."
    return Observation(
        level="in range",
        text=text,
        signal="grad_norm",
        step=view.step,
        observed=highest.observed,
        expected=highest.expected,
    )


def gradient_norms(view: EpisodeView, first: int, last: int) -> Iterator[Excess]:
    """How the gradient norms of the batches `first` to `last` stand to the healthy ones before the episode.

    Unknown ones are left out.
    """
    excesses = (view.excess("grad_norm", ordinal) for ordinal in range(max(first, 0), last + 1))
    return (e for e in excesses if e is not None)
