"""`lr_too_high`: the steps are too long for the loss surface, without an event of the schedule.

Seen by: steps that do less than their gradients promise, by experiment, or that change the weights by a percent and
more of their size throughout; a loss that grows over several batches and does not recover, or swings; several episodes
at one rate; noise that grows, or a level that had stopped falling, before the onset; a rate at its highest so far;
ordinary batches; a replay that gives the jump to the weights.

Against it: a restart or a jump of the rate just before (another cause); a rate half as high as one that the run
tolerated at the same loss; a loss that recovered with the next batch; an odd batch.

Thresholds: a chronically high rate hardly shows in one step (science.md 2.3), so trends and the absence of other
evidence count; no single observation is decisive.

To do: lower the rate to what the run was used to or tolerated, else to where its updates have a sound length
(`fixes.lower_peak`).
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.batch_ranges import REACH
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, lower_peak
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer
from lightning_spike.diagnosis.observations.experiments import first_long_test, split_of_jump, step_size_test
from lightning_spike.diagnosis.observations.gradient_in_state import EXPLODED_FACTOR
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
    SCHEDULED,
    climbed,
    highest_rate_signal,
    rate_event,
    start_of_climb,
    steady_rate,
    tolerated_later,
)
from lightning_spike.diagnosis.observations.shared_evidence import (
    LARGE_GRADIENT_FACTOR,
    batch_values,
    finite,
    gradient_in_range,
    gradient_norms,
    gradient_vanished_before,
    jump_after_ordinary_updates,
    transient_loss,
)
from lightning_spike.diagnosis.observations.step_length import keeps_falling, long_steps, oversized_first_updates
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Recovery
from lightning_spike.store import TrainerStateStore

TOLERATED_FACTOR: Final = 2.0
"""Multiple of the present rate that the run tolerated at this loss, from which the present rate is not too high;
engineering choice."""
HIGHEST_FACTOR: Final = 1.05
"""Multiple of the highest tolerated rate from which a rate is higher than ever; engineering choice."""
NOISE_GROWTH: Final = 2.0
"""Growth of the loss's noise over the last quarter from which the loss swings across a valley (edge of stability: Cohen
et al. 2022)."""
LEVEL_ROSE: Final = 1.2
"""Factor of the level just before the episode over the best level from which training was going backwards;
engineering choice."""
LEVEL_FELL: Final = 0.8
"""Factor of the loss level over the one before below which training went on well; engineering choice."""
LEVEL_BATCHES: Final = 32
"""Losses whose median is that level; engineering choice."""
MIN_LOSSES: Final = 64
"""Losses without which no trend is judged, four quarters of 16; engineering choice."""
MANY_EPISODES: Final = 3
"""Episodes in a run from which they are no accident; engineering choice."""
MIN_GROWTH_BATCHES: Final = 3
"""Batches over which a rise must go on to be growth; engineering choice."""


@observer("event")
def schedule_event(view: EpisodeView) -> Observation | None:
    """A restart or a jump of the rate, which is another cause."""
    event = rate_event(view, SCHEDULED + JUMPS)
    if event is None:
        return None
    return Observation(f"A schedule event explains it: {event.text}.", signal=event.signal, step=event.step)


@observer("climbed", "tolerated", "highest")
def rate_so_far(view: EpisodeView) -> Observation | None:
    """Whether the rate climbed, whether the run tolerated a higher one before, or whether it is the highest."""
    climb = climbed(view)
    if climb is not None:
        text, seen, usual = f"{climb.text}.", climb.now, climb.usual
        return Observation(text, level="climbed", signal=climb.signal, observed=seen, expected=usual)
    signal = highest_rate_signal(view)
    rate = None if signal is None else view.rate(signal)
    highest = None if signal is None else view.highest_healthy(signal)
    if signal is None or rate is None or highest is None or not rate > 0.0:
        return None
    if highest >= TOLERATED_FACTOR * rate:
        level, but = "tolerated", f"; the run tolerated up to {highest:.3g} before at the same loss"
    elif rate > HIGHEST_FACTOR * highest:
        level, but = "highest", f", higher than ever before at this loss ({highest:.3g})"
    else:
        return None
    return Observation(f"{signal} was {rate:.3g}{but}.", level=level, signal=signal, observed=rate, expected=highest)


@observer("went on falling", "diverges or swings", "never came back")
def _loss_shape(view: EpisodeView) -> Observation | None:
    """Whether the loss was lost, recovered, or went on falling."""
    before, kind = view.episode.loss_before, view.kind
    losses = view.store.history.between(view.episode.signal, view.onset, view.last)
    losses = losses[np.isfinite(losses)][-LEVEL_BATCHES:]
    level = float(np.median(losses)) if losses.size == LEVEL_BATCHES else None
    if before is not None and level is not None and level < LEVEL_FELL * before:
        text = f"The loss went on falling, from {before:.3g} to {level:.3g}."
        return Observation(text, level="went on falling", observed=level, expected=before)
    if kind is EpisodeKind.OSCILLATION and view.jump is not None and view.jump < LEVEL_ROSE:
        return None
    if kind in {EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION}:
        text = "The loss swings." if kind is EpisodeKind.OSCILLATION else "The loss rose and did not recover."
        return Observation(text, level="diverges or swings", expected=before)
    is_lost = view.episode.recovery is Recovery.NEVER and kind is EpisodeKind.SPIKE
    return Observation("The loss did not recover.", level="never came back") if is_lost else None


@observer("never tolerated")
def _never_tolerated(view: EpisodeView) -> Observation | None:
    return _later(view, tolerated=False)


@observer("tolerated later")
def rate_later(view: EpisodeView) -> Observation | None:
    """The run tolerated the rate later, so it only came too soon."""
    return _later(view, tolerated=True)


def _later(view: EpisodeView, *, tolerated: bool) -> Observation | None:
    signal = highest_rate_signal(view)
    later = None if signal is None else tolerated_later(view, signal)
    return None if later is None or later[1] is not tolerated else Observation(later[0])


@observer("non-finite at once", "grew")
def _loss_growth(view: EpisodeView) -> Observation | None:
    """Whether the loss grew over several batches, as with steps that are a little too long, or jumped at once."""
    first = view.at_onset(view.episode.signal)
    if first is not None and not math.isfinite(first):
        text = "The loss became non-finite from one batch to the next; too long steps need several batches for that."
        return Observation(text, level="non-finite at once")
    if view.sudden is None or view.transient:
        return None
    losses = view.store.history.between(view.episode.signal, view.onset, view.episode.peak.ordinal)
    losses = losses[np.isfinite(losses)]
    if view.sudden or losses.size < MIN_GROWTH_BATCHES:
        return None
    text = f"The loss grew over {losses.size} batches to its peak."
    return Observation(text, level="grew", observed=float(losses[-1]), expected=view.episode.loss_before)


@observer("noise grew", "was rising")
def trend_before(view: EpisodeView) -> Observation | None:
    """Whether the loss had become noisier or was rising before the episode."""
    losses = view.before(view.episode.signal, 2 * MIN_LOSSES)
    if losses.size < MIN_LOSSES:
        return None
    bends = np.abs(np.diff(losses, n=2))
    quarter = losses.size // 4
    calm, recent = float(np.median(bends[:-quarter])), float(np.median(bends[-quarter:]))
    levels = [float(np.median(losses[k : k + quarter])) for k in range(0, losses.size - quarter + 1, quarter)]
    if calm > 0.0 and recent / calm >= NOISE_GROWTH and levels[-1] >= LEVEL_FELL * levels[0]:
        text = f"The noise of the loss had grown {sentences.times(recent / calm)} before the onset."
        return Observation(text, level="noise grew", observed=recent, expected=calm)
    best = min(levels[:-1])
    if not (min(levels) > 0.0 and levels[-1] >= LEVEL_ROSE * best):
        return None
    text = f"The loss was rising before the onset already: {levels[-1]:.3g} after {best:.3g}."
    return Observation(text, level="was rising", observed=levels[-1], expected=best)


@observer("many")
def many_episodes(view: EpisodeView) -> Observation | None:
    """Several episodes in one run are more than an accident."""
    no_jump = {EpisodeKind.OVERFIT, EpisodeKind.STALL}
    like = [e for e in view.store.episodes if e.kind not in no_jump and e.period is None]
    if view.transient or len(like) < MANY_EPISODES or finite(view.episode.severity) is None:
        return None
    return Observation(f"This is one of {len(like)} episodes in this run.", observed=float(len(like)))


@observer("by experiment", "by length", "by first updates", signal="update_norm")
def steps(view: EpisodeView) -> Observation | None:
    """The length of the steps apart from the episode, by the lab or by the size of the updates."""
    test = step_size_test(view)
    if test is not None:
        text, rho = sentences.step_size(test.result), finite(test.result.rho)
        return Observation(
            text, level="by experiment", signal="lab/steps", step=test.at.step, observed=rho, expected=1.0
        )
    long = long_steps(view.store)
    if long is not None:
        return Observation(long.text, level="by length", observed=long.share)
    first = oversized_first_updates(view.store)
    if first is None or first.after.ordinal > view.onset or keeps_falling(view.store):
        return None
    text = f"{first.text} The loss has not fallen since."
    return Observation(text, level="by first updates", step=first.after.step, observed=first.share)


@observer("in range", "10-fold at once", "100-fold at once", "1000-fold at once", signal="grad_norm")
def _gradient_growth(view: EpisodeView) -> Observation | None:
    """Whether a gradient exploded in one step before the loss rose; too long steps raise gradient and loss together."""
    above = [e for e in gradient_norms(view, view.onset - REACH, view.onset - 1) if e.above]
    if not above:
        return None if view.transient or view.sudden or not steady_rate(view) else gradient_in_range(view)
    first, lead = above[0], max(above, key=lambda e: e.ratio)
    before = view.excess("grad_norm", first.ordinal - 1)
    if lead.ratio < EXPLODED_FACTOR or before is None or before.ratio >= LARGE_GRADIENT_FACTOR or view.onset < REACH:
        return None
    rise = f"from {before.observed:.3g} to {first.observed:.3g} in one step before the loss rose"
    level = next((name for factor, name in EXPLOSIONS if first.ratio >= factor), "10-fold at once")
    text = f"The gradient norm rose {rise}, and to {lead.observed:.3g}."
    return Observation(text, level=level, observed=finite(lead.observed), expected=lead.expected)


EXPLOSIONS: Final = ((1000.0, "1000-fold at once"), (100.0, "100-fold at once"))
"""Factors over the usual gradient norm, by level."""


def _shown(store: TrainerStateStore) -> Shown | None:
    climb = start_of_climb(store)
    rise = None if climb is None else rise_after(store, climb.ordinal)
    if rise is not None:
        return Shown(at=rise.begun, rise=rise)
    if (test := first_long_test(store)) is not None:
        return Shown(at=test.at)
    if (long := long_steps(store)) is not None:
        return Shown(at=long.last)
    first = oversized_first_updates(store)
    return None if first is None or keeps_falling(store) else Shown(at=first.after)


def _summary(view: EpisodeView) -> str:
    signal = highest_rate_signal(view)
    rate = None if signal is None else view.rate(signal)
    at = "" if rate is None else f" at {signal} = {rate:.3g}"
    return f"The steps are too long{at}, without a schedule event: from step {view.step} on {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    signal = highest_rate_signal(view)
    rate = None if signal is None else view.rate(signal)
    if signal is None or rate is None or not rate > 0.0:
        return (Fix("Lower the learning rate by a factor of 3."), *clip_fix(view))
    value, why = lower_peak(view, signal, rate)
    lower = Fix(f"Lower {signal} from {rate:.3g} to {value:g}: {why}.", Change(setting=signal, value=value))
    return (lower, *clip_fix(view))


TESTED_BY: Final = frozenset({Group.INTRINSIC})

CAUSE: Final = Cause(
    id="lr_too_high",
    family=Family.LEARNING_RATE,
    title="The learning rate is too high",
    meaning="the step size is too long for the loss surface, without a schedule event",
    observations=(
        schedule_event,
        rate_so_far,
        first_of("loss_shape", _loss_shape, _never_tolerated),
        first_of("loss_growth", jump_after_ordinary_updates, _loss_growth),
        trend_before,
        many_episodes,
        steps,
        rate_later,
        transient_loss,
        first_of("gradient_growth", gradient_vanished_before, _gradient_growth),
        batch_values,
        split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    tested_by=TESTED_BY,
    shown=_shown,
)
