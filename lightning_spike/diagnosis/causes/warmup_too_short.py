"""`warmup_too_short`: the early spike of a warm-up that is missing or ends too soon.

Seen by: an onset in the first updates of the run, with the rate at more than half of its peak from the start, or just
after the end of a short ramp; above all by what follows: later the loss is lower than ever at the same rate, so the
rate only came too soon.

Against it: an onset later on (decisive); a rate far below its peak; a loss that never recovered at that rate (then it
is too high throughout); an odd batch; a run that was resumed.

Thresholds: Adam's second moment needs 2 / (1 - beta2) steps to settle (Ma & Yarats 2021), so an onset up to there
counts as early, but not past 64 updates or a tenth of the run.

To do: let the rate rise over so many updates.
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis.batch_ranges import NEAR
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, highest_sound_rate, warmup_steps
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.experiments import first_long_test, split_of_jump
from lightning_spike.diagnosis.observations.loss_rise import Shown
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
    SCHEDULED,
    highest_rate_signal,
    rate_event,
    tolerated_later,
)
from lightning_spike.diagnosis.observations.shared_evidence import (
    batch_values,
    jump_after_ordinary_updates,
    transient_loss,
)
from lightning_spike.diagnosis.observations.step_length import (
    keeps_falling,
    long_steps,
    oversized_first_updates,
    passed_early_peak,
)
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family
from lightning_spike.store import TrainerStateStore

EARLY_UPDATES: Final = 64
"""Updates that are early in any run; engineering choice."""
EARLY_SHARE: Final = 0.1
"""Share of the run so far that is early; engineering choice."""
UP_SHARE: Final = 0.5
"""Share of its later peak from which the rate is up (science.md 2.1: above 50 % of the peak within 2 / (1 - beta2)
steps)."""
AFTER_PEAK: Final = 32
"""Updates after the end of a warm-up in which its effect shows; engineering choice."""
START_FACTOR: Final = 0.01
"""Share of the peak at which the advised warm-up starts; engineering choice."""
SMALL_JUMPS: Final = ("less than 2-fold", "2-fold")
"""Jumps of the loss that steps can still have caused."""


@observer("resumed", "late", "rate unknown", signal="lr")
def start_of_run(view: EpisodeView) -> Observation | None:
    """The premise: the first updates of an untrained model, and a known rate."""
    if view.facts.first_step > 0:
        text = "The run was resumed: its first updates are not those of an untrained model."
        return Observation(text, level="resumed")
    if not view.rate_signals:
        return Observation("No learning rate was recorded.", level="rate unknown")
    text = f"It began {_updates(view)} updates into the run, long after its start."
    return Observation(text, level="late") if _updates(view) > _early_limit(view) else None


@observer("early", signal="lr")
def early_onset(view: EpisodeView) -> Observation | None:
    """How many updates into the run the episode began."""
    updates = _updates(view)
    return Observation(f"It began {updates} updates into the run.", observed=float(updates))


@observer("still low", "early peak", "no warm-up", "short warm-up")
def ramp(view: EpisodeView) -> Observation | None:
    """Whether the rate was up from the start, had just come up, or was still low."""
    signal = highest_rate_signal(view)
    rates = np.zeros(0) if signal is None else view.store.history.before(signal, view.onset, view.onset)
    rate, peak = (None, 0.0) if signal is None else (view.rate(signal), _peak(view, signal))
    if signal is None or rates.size == 0 or rate is None or not peak > 0.0:
        return None
    level, top, first = _ramp_level(view, rates, rate, peak), f"{peak:.3g}", f"{rates[0]:.3g}"
    if level is None:
        return None
    text = {
        "still low": f"{signal} was {rate:.3g}, far below its later peak of {top}.",
        "early peak": f"A warm-up took {signal} from {first} to its peak of {top}, and it soon fell to half of it.",
        "no warm-up": f"There is no warm-up: {signal} was {first} from the first update on.",
        "short warm-up": f"The warm-up passed half of its peak ({signal} {top}) a few updates before the loss rose.",
    }[level]
    return Observation(text, level=level, signal=signal, observed=rate, expected=peak)


def _ramp_level(view: EpisodeView, rates: "np.typing.NDArray[np.float64]", rate: float, peak: float) -> str | None:
    if rate < UP_SHARE * peak:
        return "still low"
    up = int(np.argmax(rates >= UP_SHARE * peak))
    is_recent = rates.size - up <= AFTER_PEAK
    if passed_early_peak(view.store) and is_recent:
        return "early peak"
    if up <= NEAR:
        return "no warm-up"
    return "short warm-up" if is_recent else None


@observer("then fell", "at an early peak", signal="update_norm")
def oversized_updates(view: EpisodeView) -> Observation | None:
    """Whether the first updates threw the initial weights away, which a warm-up prevents."""
    first = oversized_first_updates(view.store)
    if first is None or first.after.ordinal > view.onset + NEAR:
        return None
    if keeps_falling(view.store):
        level, text = "then fell", f"{first.text} Later the loss went on falling."
    elif passed_early_peak(view.store):
        level, text = "at an early peak", f"{first.text} The rate peaked early and soon fell."
    else:
        return None
    return Observation(text, level=level, step=first.after.step, observed=first.share)


@observer("tolerated", "never tolerated")
def same_rate_later(view: EpisodeView) -> Observation | None:
    """Whether the loss fell later at about the same rate; asked only where steps can be the cause."""
    jumped, signal = jump_after_ordinary_updates(view), highest_rate_signal(view)
    if signal is None or (jumped is not None and jumped.level not in SMALL_JUMPS):
        return None
    later = tolerated_later(view, signal)
    if later is None or (not later[1] and passed_early_peak(view.store)):
        return None  # where the rate fell soon, a loss that was lost for good is no evidence about it
    level = "tolerated" if later[1] else "never tolerated"
    return Observation(later[0], level=level, signal=signal, expected=view.episode.loss_before)


@observer("event")
def schedule_event(view: EpisodeView) -> Observation | None:
    """An event of the schedule at the onset."""
    event = rate_event(view, SCHEDULED + JUMPS)
    if event is None or event.ordinal <= NEAR:
        return None
    return Observation(f"The schedule has an event there: {event.text}.", signal=event.signal, step=event.step)


def _updates(view: EpisodeView) -> int:
    return view.step - view.facts.first_step


def _early_limit(view: EpisodeView) -> float:
    run = view.store.history.ordinals.size
    settled = 2.0 / (1.0 - view.beta2) if view.beta2 is not None and view.beta2 < 1.0 else math.inf
    return min(settled, max(EARLY_UPDATES, EARLY_SHARE * run / max(view.facts.accumulate_grad_batches, 1)))


def _peak(view: EpisodeView, signal: str) -> float:
    """The highest rate of the first part of the run, where a warm-up ends; later peaks belong to the schedule."""
    rates = view.store.history.between(signal, 0, 4 * max(view.onset, EARLY_UPDATES))
    rates = rates[np.isfinite(rates)]
    return float(rates.max()) if rates.size else 0.0


def _lower_peak(view: EpisodeView, signal: str) -> float | None:
    """The peak to use where updates at the present one are too long for a warm-up to help; else `None`."""
    most = highest_sound_rate(view, signal)
    return most if most is not None and most < _peak(view, signal) else None


def _shown(store: TrainerStateStore) -> Shown | None:
    first = oversized_first_updates(store)
    if first is None or first_long_test(store) is not None or long_steps(store) is not None:
        return None
    if keeps_falling(store):  # tolerated, so reported only in a run without an episode
        return None if store.episodes else Shown(at=first.after)
    return Shown(at=first.after) if passed_early_peak(store) else None


def _summary(view: EpisodeView) -> str:
    signal = highest_rate_signal(view)
    rate = None if signal is None else view.rate(signal)
    at = "the learning rate was up" if rate is None else f"{signal} was at {rate:.3g}"
    return f"{_updates(view)} updates into the run {at} already, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    signal = highest_rate_signal(view)
    if signal is None:
        return ()
    steps, why = warmup_steps(view)
    lower, peak = _lower_peak(view, signal), _peak(view, signal)
    to = peak if lower is None else lower
    schedule = f"LinearLR(optimizer, start_factor={START_FACTOR}, total_iters={steps}), interval 'step'"
    rise = (
        f"Let {signal} rise from {START_FACTOR * to:.2g} to {to:.3g} over the first {steps} updates ({why}): "
        f"torch.optim.lr_scheduler.{schedule}."
    )
    fix = Fix(rise, Change(setting="warmup_steps", value=float(steps)))
    if lower is None:
        return (fix, *clip_fix(view))
    text = (
        f"Lower the peak of {signal} from {peak:.3g} to {lower:.3g}: above, an update like this run's longest "
        "would change the weights by more than a tenth of their size."
    )
    return (Fix(text, Change(setting=signal, value=lower)), fix, *clip_fix(view))


TESTED_BY: Final = frozenset({Group.LEARNING_RATE, Group.INTRINSIC})

CAUSE: Final = Cause(
    id="warmup_too_short",
    family=Family.LEARNING_RATE,
    title="The warm-up is missing or too short",
    meaning="the early spike of a warm-up that is missing or ends too soon",
    requires=(start_of_run,),
    observations=(
        early_onset,
        ramp,
        oversized_updates,
        same_rate_later,
        schedule_event,
        jump_after_ordinary_updates,
        transient_loss,
        batch_values,
        split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    tested_by=TESTED_BY,
    shown=_shown,
)
