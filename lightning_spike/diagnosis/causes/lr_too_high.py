"""`lr_too_high`: the step size is beyond what the loss surface bears, with no event of the schedule to blame.

Seen by: steps that do not keep what their gradients promise, by experiment, or that change the weights by a percent and
more of their size all along; a loss that grows over several batches and does not come back, or swings; several episodes
under one rate; noise that grows, or a level that had stopped falling, before the onset; a rate at its highest so far;
ordinary batches; a replay that gives the jump to the weights.

Against it: a restart or a jump of the rate just before (it has its own cause); a rate half as high as one that the run
tolerated at the same level of the loss; a loss that was back with the next batch; an odd batch.

Thresholds: a chronically high rate hardly shows in one step (science.md 2.3), so this is judged by trend and by what is
*not* there; no single observation is decisive.

To do: lower the rate to what the run was used to or has tolerated, else to where its updates are of a healthy length
(`fixes.lower_peak`).
"""

import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.constants import REACH
from lightning_spike.diagnosis.fixes import clip_fix, lower_peak
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer
from lightning_spike.diagnosis.observations.experiments import first_long_test, split_of_jump, step_size_test
from lightning_spike.diagnosis.observations.gradient_in_state import EXPLODED
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
    SCHEDULED,
    begins_to_climb,
    climbed,
    rate_event,
    steady_rate,
    tolerated_later,
)
from lightning_spike.diagnosis.observations.shared_evidence import (
    batch_values,
    finite,
    gradient_in_range,
    gradient_norms,
    gradient_vanished_before,
    jump_after_ordinary_updates,
    transient_loss,
)
from lightning_spike.diagnosis.observations.step_length import goes_on_falling, long_steps, wild_start
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Recovery
from lightning_spike.store import TrainerStateStore

TOLERATED_FACTOR: Final = 2.0
"""A rate so many times higher that the run has tolerated, at this level of the loss, clears the present one;
engineering choice."""
HIGHEST_FACTOR: Final = 1.05
"""A rate so many times the highest tolerated one is higher than ever; engineering choice."""
NOISE_GROWTH: Final = 2.0
"""Growth of the loss's noise, in the loss's own unit, over the last quarter of the reference that speaks of swings
across a valley (edge of stability: Cohen et al. 2022)."""
LEVEL_ROSE: Final = 1.2
"""Level just before the episode over the best level of the run from which training was going backwards already;
engineering choice."""
LEVEL_FELL: Final = 0.8
"""Level of the loss over the one before below which training went on all the same; engineering choice."""
LEVEL_BATCHES: Final = 32
"""Batches that make that level."""
MIN_LOSSES: Final = 64
"""Losses without which nothing is said of a trend: four quarters of 16."""
MANY_EPISODES: Final = 3
"""Episodes in a run from which it is more than an accident; engineering choice."""
SMALL_GRADIENT: Final = 3.0
"""Factor over its usual norm up to which a gradient had not begun to grow; engineering choice."""
MIN_GROWTH_BATCHES: Final = 3
"""Batches over which a rise must go on to be called growth; engineering choice."""


@observer("event")
def schedule_event(view: EpisodeView) -> Observation | None:
    """A restart or a jump of the rate has its own cause."""
    event = rate_event(view, SCHEDULED + JUMPS)
    if event is None:
        return None
    return Observation(
        level="event", text=f"A schedule event explains it: {event.text}.", signal=event.signal, step=event.step
    )


@observer("climbed", "tolerated", "highest")
def rate_so_far(view: EpisodeView) -> Observation | None:
    """Whether the run has tolerated a higher rate before, or the present one is its highest."""
    climb = climbed(view)
    if climb is not None:
        return Observation(
            level="climbed",
            text=f"{climb.text}.",
            signal=climb.signal,
            step=view.step,
            observed=climb.now,
            expected=climb.usual,
        )
    signal = _highest_signal(view)
    rate = None if signal is None else view.rate(signal)
    highest = None if signal is None else view.highest_healthy(signal)
    if signal is None or rate is None or highest is None or not rate > 0.0:
        return None
    if highest >= TOLERATED_FACTOR * rate:
        level, text = (
            "tolerated",
            f"{signal} was {rate:.3g}; the run tolerated up to {highest:.3g} before at the same loss.",
        )
    elif rate > HIGHEST_FACTOR * highest:
        level, text = "highest", f"{signal} was {rate:.3g}, higher than ever before at this loss ({highest:.3g})."
    else:
        return None
    return Observation(level=level, text=text, signal=signal, step=view.step, observed=rate, expected=highest)


@observer("went on falling", "diverges or swings", "never came back")
def _loss_shape(view: EpisodeView) -> Observation | None:
    """Whether the loss was lost, came back, or went on falling through it all."""
    before, signal = view.episode.loss_before, view.episode.signal
    losses = view.store.history.between(signal, view.onset, view.last)
    losses = losses[np.isfinite(losses)][-LEVEL_BATCHES:]
    level = float(np.median(losses)) if losses.size == LEVEL_BATCHES else None
    if before is not None and level is not None and level < LEVEL_FELL * before:
        text = f"The loss went on falling, from {before:.3g} to {level:.3g}."
        return Observation(
            level="went on falling", text=text, signal=signal, step=view.step, observed=level, expected=before
        )
    if view.kind is EpisodeKind.OSCILLATION and view.jump is not None and view.jump < LEVEL_ROSE:
        return None
    if view.kind in {EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION}:
        text = "The loss swings." if view.kind is EpisodeKind.OSCILLATION else "The loss rose and did not come back."
        return Observation(level="diverges or swings", text=text, signal=signal, step=view.step, expected=before)
    if view.episode.recovery is Recovery.NEVER and view.kind is EpisodeKind.SPIKE:
        return Observation(level="never came back", text="The loss did not come back.", signal=signal, step=view.step)
    return None


@observer("never tolerated")
def _never_tolerated(view: EpisodeView) -> Observation | None:
    return _later(view, tolerated=False)


@observer("tolerated later")
def rate_later(view: EpisodeView) -> Observation | None:
    """The run tolerated that rate later, so that it only came too soon."""
    return _later(view, tolerated=True)


def _later(view: EpisodeView, *, tolerated: bool) -> Observation | None:
    signal = _highest_signal(view)
    later = None if signal is None else tolerated_later(view, signal)
    if later is None or later[1] is not tolerated:
        return None
    level = "tolerated later" if tolerated else "never tolerated"
    return Observation(level=level, text=later[0], signal=view.episode.signal, step=view.step)


@observer("non-finite at once", "grew")
def _loss_growth(view: EpisodeView) -> Observation | None:
    """Whether the loss grew over several batches, as under a step that is a little too long each time, or jumped at once."""
    first, signal = view.at_onset(view.episode.signal), view.episode.signal
    if first is not None and not math.isfinite(first):
        text = "The loss became non-finite from one batch to the next; steps that are too long need several batches for that."
        return Observation(level="non-finite at once", text=text, signal=signal, step=view.step)
    if view.sudden is None or view.transient:
        return None
    losses = view.store.history.between(signal, view.onset, view.episode.peak.ordinal)
    losses = losses[np.isfinite(losses)]
    if view.sudden or losses.size < MIN_GROWTH_BATCHES:
        return None
    text = f"The loss grew over {losses.size} batches to its peak."
    return Observation(
        level="grew",
        text=text,
        signal=signal,
        step=view.step,
        observed=float(losses[-1]),
        expected=view.episode.loss_before,
    )


@observer("noise grew", "was rising")
def trend_before(view: EpisodeView) -> Observation | None:
    """Whether training had gone rough or backwards before the episode."""
    losses = view.before(view.episode.signal, 2 * MIN_LOSSES)
    if losses.size < MIN_LOSSES:
        return None
    bends = np.abs(np.diff(losses, n=2))
    quarter = losses.size // 4
    calm, recent = float(np.median(bends[:-quarter])), float(np.median(bends[-quarter:]))
    levels = [float(np.median(losses[k : k + quarter])) for k in range(0, losses.size - quarter + 1, quarter)]
    if calm > 0.0 and recent / calm >= NOISE_GROWTH and levels[-1] >= LEVEL_FELL * levels[0]:
        text = f"The noise of the loss had grown ×{recent / calm:.2g} before the onset."
        level, observed, expected = "noise grew", recent, calm
    elif min(levels) > 0.0 and levels[-1] >= LEVEL_ROSE * min(levels[:-1]):
        level, observed, expected = "was rising", levels[-1], min(levels[:-1])
        text = f"The loss was rising before the onset already: {observed:.3g} after {expected:.3g}."
    else:
        return None
    return Observation(
        level=level, text=text, signal=view.episode.signal, step=view.step, observed=observed, expected=expected
    )


@observer("many")
def many_episodes(view: EpisodeView) -> Observation | None:
    """Several episodes in one run are more than an accident."""
    no_jump = {EpisodeKind.OVERFIT, EpisodeKind.STALL}
    like = [e for e in view.store.episodes if e.kind not in no_jump and e.period is None]
    if view.transient or len(like) < MANY_EPISODES or finite(view.episode.severity) is None:
        return None
    text = f"This is one of {len(like)} episodes in this run."
    return Observation(level="many", text=text, signal=view.episode.signal, step=view.step, observed=float(len(like)))


@observer("by experiment", "by length", "by first updates")
def steps(view: EpisodeView) -> Observation | None:
    """What the lab, or the size of the updates, says of the steps without regard to the episode."""
    test = step_size_test(view)
    if test is not None:
        text = sentences.step_size(test.result)
        return Observation(
            level="by experiment",
            text=text,
            signal="lab/steps",
            step=test.at.step,
            observed=finite(test.result.rho),
            expected=1.0,
        )
    long = long_steps(view.store)
    if long is not None:
        return Observation(level="by length", text=long.text, signal="update_norm", step=view.step, observed=long.share)
    wild = wild_start(view.store)
    if wild is None or wild.after.ordinal > view.onset or goes_on_falling(view.store):
        return None
    text = f"{wild.text} The loss has not fallen since."
    return Observation(
        level="by first updates", text=text, signal="update_norm", step=wild.after.step, observed=wild.share
    )


@observer("in range", "10-fold at once", "100-fold at once", "1000-fold at once")
def _gradient_growth(view: EpisodeView) -> Observation | None:
    """A step that is too long lets gradient and loss grow together.

    A gradient that exploded from one update to the next came first.
    """
    above = [e for e in gradient_norms(view, view.onset - REACH, view.onset - 1) if e.above]
    if not above:
        return None if view.transient or view.sudden or not steady_rate(view) else gradient_in_range(view)
    first, lead = above[0], max(above, key=lambda e: e.ratio)
    before = view.excess("grad_norm", first.ordinal - 1)
    if lead.ratio < EXPLODED or before is None or before.ratio >= SMALL_GRADIENT or view.onset < REACH:
        return None
    text = (
        f"The gradient norm rose from {before.observed:.3g} to {first.observed:.3g} in one step before the loss rose, "
        f"and to {lead.observed:.3g}."
    )
    level = next((name for factor, name in EXPLOSIONS if first.ratio >= factor), "10-fold at once")
    return Observation(
        level=level,
        text=text,
        signal="grad_norm",
        step=view.step,
        observed=finite(lead.observed),
        expected=lead.expected,
    )


EXPLOSIONS: Final = ((1000.0, "1000-fold at once"), (100.0, "100-fold at once"))
"""Factors over the usual gradient norm, by level."""


def _highest_signal(view: EpisodeView) -> str | None:
    rates = {s: rate for s in view.rate_signals if (rate := view.rate(s)) is not None}
    return max(rates, key=lambda s: rates[s], default=None)


def _shown(store: TrainerStateStore) -> Shown | None:
    climb = begins_to_climb(store)
    rise = None if climb is None else rise_after(store, climb.ordinal)
    if rise is not None:
        return Shown(at=rise.begun, rise=rise)
    if (test := first_long_test(store)) is not None:
        return Shown(at=test.at)
    if (long := long_steps(store)) is not None:
        return Shown(at=long.last)
    wild = wild_start(store)
    return None if wild is None or goes_on_falling(store) else Shown(at=wild.after)


def _summary(view: EpisodeView) -> str:
    signal = _highest_signal(view)
    rate = None if signal is None else view.rate(signal)
    at = "" if rate is None else f" at {signal} = {rate:.3g}"
    return f"The steps are too long{at}: from step {view.step} on {view.loss_text}, with no event of the schedule to blame."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    signal = _highest_signal(view)
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
    meaning="the step size is too long for the loss surface, with no schedule event to blame",
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
