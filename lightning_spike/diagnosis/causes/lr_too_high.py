"""`lr_too_high`: the step size is beyond what the loss surface bears."""

import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REACH, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix, lower_peak
from lightning_spike.diagnosis.observations.held import EXPLODED
from lightning_spike.diagnosis.observations.measured import steps_too_long
from lightning_spike.diagnosis.observations.quiet import Shown, rise_after
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
    SCHEDULED,
    begins_to_climb,
    borne_later,
    climbed,
    rate_event,
    steady_rate,
)
from lightning_spike.diagnosis.observations.step_length import goes_on_falling, long_steps, wild_start
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    finite,
    gradient_all_but_gone,
    gradient_in_range,
    gradient_norms,
    jump_without_cause_in_update,
    lone_batch,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Recovery
from lightning_spike.store import TrainerStateStore

BORNE: Final = 2.0
"""A rate so many times higher that the run has borne before, at this level of the loss, clears the present one."""
ROUGH: Final = 2.0
"""Growth of the loss's noise, in the loss's own unit (on the log scale it grows in any healthy run), over the last quarter of the reference that speaks of swings across a valley (edge of stability: Cohen et al. 2022)."""
ROSE: Final = 1.2
"""Level just before the episode over the best level of the run from which training was going backwards already."""
WENT_ON: Final = 0.8
"""Level of the loss over the one before below which training went on all the same; noise that grows while the loss falls is that of a model that begins to learn."""
WELL_AFTER: Final = 32
"""Batches that make that level."""
OFTEN: Final = 3
"""Episodes in a run from which it is more than an accident."""
OUT_OF_THE_BLUE: Final = 2.0 * DECISIVE
"""Cap of the weight of a gradient that explodes from one update to the next under a steady rate: steps that are too long let it grow over several, so this refutes them whatever followed."""
SMALL: Final = 3.0
"""Factor over its usual norm up to which a gradient had not begun to grow."""
GROWTH: Final = 3
"""Batches over which a rise must go on to be called growth."""


class LrTooHigh(Cause):
    """The step size is beyond what the loss surface bears, with no event of the schedule to blame.

    Seen by: steps that do not keep what their gradients promise, by experiment, or that change the weights by a percent and more of their size all along; a loss that grows over several batches and does not come back, or swings; several episodes under one rate; noise that grows, or a level that had
    stopped falling, before the onset; a rate at its highest so far; ordinary batches; a replay that gives the jump to the weights.

    Against it: a restart or a jump of the rate just before (it has its own cause); a rate half as high as one that the run bore at the same level of the loss;
    a loss that was back with the next batch; an odd batch.

    Thresholds: a chronically high rate hardly shows in one step (science.md 2.3), so this is judged by trend and by what is *not* there; no
    single observation is decisive.

    To do: lower the rate to what the run was used to or has borne, else to where its updates are of a healthy length (`fixes.lower_peak`).
    """

    id: ClassVar = "lr_too_high"
    family: ClassVar = Family.LEARNING_RATE
    tested_by: ClassVar = frozenset({"intrinsic"})
    title: ClassVar = "The learning rate is too high"
    explains: ClassVar = frozenset({"gradient_explosion", "numerical_instability"})
    standing: ClassVar = frozenset({("lab", "steps_too_long")})

    @override
    def shown(self, store: TrainerStateStore) -> Shown | None:
        climb = begins_to_climb(store)
        rise = None if climb is None else rise_after(store, climb.ordinal)
        if rise is not None:
            return Shown(at=rise.begun, rise=rise)
        if (told := super().shown(store)) is not None:
            return told
        if (steps := long_steps(store)) is not None:
            return Shown(at=steps.last)
        wild = wild_start(store)
        return None if wild is None or goes_on_falling(store) else Shown(at=wild.after)

    @override
    def examine(self, case: Case) -> Examination:
        signal = _highest_signal(case)
        evidence = without_none(
            _event(case),
            _borne(case, signal),
            _shape(case) or _later(case, signal, borne=False),
            jump_without_cause_in_update(case, sign=-1.0) or _growth(case),
            _before_onset(case),
            _often(case),
            _steps(case),
            _later(case, signal, borne=True),
            lone_batch(case, -STRONG),
            gradient_all_but_gone(case, -DECISIVE) or _gradient(case),
            batch_value(case, ordinary=0.0, odd=-FAIR),
            split_verdict(case, {"data": -STRONG, "weights": FAIR, "noise": -FAIR}),
        )
        rate = case.rate(signal) if signal is not None else None
        at = f" at {signal} = {rate:.3g}" if rate is not None else ""
        return Examination(
            evidence=evidence,
            summary=f"The steps are too long{at}: from step {case.step} on {case.loss_text}, with no event of the schedule to blame.",
            fixes=_fixes(case, signal, rate),
            change=_change(case, signal, rate),
            confirmed=False if case.split == "data" else None,
        )


def _highest_signal(case: Case) -> str | None:
    rates = {s: rate for s in case.rate_signals if (rate := case.rate(s)) is not None}
    return max(rates, key=lambda s: rates[s], default=None)


def _event(case: Case) -> Evidence | None:
    event = rate_event(case, SCHEDULED + JUMPS)
    if event is None:
        return None
    return tell(event.signal, f"There is an event to blame: {event.text}.", -STRONG, step=event.step)


def _borne(case: Case, signal: str | None) -> Evidence | None:
    """Whether the run has borne a higher rate before, or the present one is its highest."""
    climb = climbed(case)
    if climb is not None:
        return tell(climb.signal, f"{climb.text}.", STRONG, step=case.step, observed=climb.now, expected=climb.usual)
    rate = case.rate(signal) if signal is not None else None
    highest = case.highest_healthy(signal) if signal is not None else None
    if signal is None or rate is None or highest is None or not rate > 0.0:
        return None
    if highest >= BORNE * rate:
        text = f"{signal} was {rate:.3g}; up to {highest:.3g} had been borne before, at the same level of the loss."
        return tell(signal, text, -STRONG, step=case.step, observed=rate, expected=highest)
    if rate > 1.05 * highest:
        text = f"{signal} was {rate:.3g}, higher than at any time before at this level of the loss ({highest:.3g})."
        return tell(signal, text, FAIR, step=case.step, observed=rate, expected=highest)
    return None


def _shape(case: Case) -> Evidence | None:
    """Whether the loss was lost, came back, or went on falling through it all."""
    before = case.episode.loss_before
    losses = case.store.history.between(case.episode.signal, case.onset, case.last)
    losses = losses[np.isfinite(losses)][-WELL_AFTER:]
    if before is not None and losses.size == WELL_AFTER and float(np.median(losses)) < WENT_ON * before:
        level = float(np.median(losses))
        text = f"The loss went on falling through it, from {before:.3g} to {level:.3g}."
        return tell(case.episode.signal, text, -STRONG, step=case.step, observed=level, expected=before)
    if case.kind is EpisodeKind.OSCILLATION and case.jump is not None and case.jump < ROSE:
        return None
    if case.kind in {EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION}:
        text = "The loss " + ("swings." if case.kind is EpisodeKind.OSCILLATION else "rose and did not come back.")
        return tell(case.episode.signal, text, FAIR, step=case.step, expected=before)
    if case.episode.recovery is Recovery.NEVER and case.kind is EpisodeKind.SPIKE:
        return tell(case.episode.signal, "The loss did not come back.", SLIGHT, step=case.step)
    return None


def _growth(case: Case) -> Evidence | None:
    """Whether the loss grew over several batches, as under a step that is a little too long each time, or was out at one blow."""
    first = case.at_onset(case.episode.signal)
    if first is not None and not math.isfinite(first):
        text = (
            "The loss was not finite from one batch to the next; steps that are too long need several batches for that."
        )
        return tell(case.episode.signal, text, -FAIR, step=case.step)
    if case.sudden is None or case.lone:
        return None
    losses = case.store.history.between(case.episode.signal, case.onset, case.episode.peak.ordinal)
    losses = losses[np.isfinite(losses)]
    if case.sudden or losses.size < GROWTH:
        return None
    text = f"The loss grew over {losses.size} batches to its peak."
    return tell(
        case.episode.signal, text, FAIR, step=case.step, observed=float(losses[-1]), expected=case.episode.loss_before
    )


def _gradient(case: Case) -> Evidence | None:
    """A step that is too long lets gradient and loss grow together; a gradient that exploded at one blow came first."""
    above = [e for e in gradient_norms(case, case.onset - REACH, case.onset - 1) if e.above]
    if not above:
        return None if case.lone or case.sudden or not steady_rate(case) else gradient_in_range(case, SLIGHT)
    first, lead = above[0], max(above, key=lambda e: e.ratio)
    before = case.excess("grad_norm", first.ordinal - 1)
    if lead.ratio < EXPLODED or before is None or before.ratio >= SMALL or case.onset < REACH:
        return None
    text = f"The gradient norm went from {before.observed:.3g} to {first.observed:.3g} in one step before the loss rose, and to {lead.observed:.3g}."
    observed = lead.observed if math.isfinite(lead.observed) else None
    weight = -min(math.log(first.ratio), OUT_OF_THE_BLUE) if math.isfinite(first.ratio) else -OUT_OF_THE_BLUE
    return tell("grad_norm", text, weight, step=case.step, observed=observed, expected=lead.expected)


def _steps(case: Case) -> Evidence | None:
    """What the lab, or the size of the updates, says of the steps without regard to the episode."""
    found = steps_too_long(case)
    if found is not None:
        text, rho = str(found.detail.get("text")), number(found.detail.get("rho"))
        return tell("lab/steps", text, STRONG, step=found.at.step, observed=rho, expected=1.0)
    steps = long_steps(case.store)
    if steps is not None:
        return tell("update_norm", steps.text, FAIR, step=case.step, observed=steps.share)
    wild = wild_start(case.store)
    if wild is None or wild.after.ordinal > case.onset or goes_on_falling(case.store):
        return None
    text = f"{wild.text} The loss has not come down since."
    return tell("update_norm", text, STRONG, step=wild.after.step, observed=wild.share)


def _before_onset(case: Case) -> Evidence | None:
    """Whether training had gone rough or backwards before the episode."""
    losses = case.before(case.episode.signal, 128)
    if losses.size < 64:  # noqa: PLR2004 - four quarters of 16
        return None
    bends = np.abs(np.diff(losses, n=2))
    quarter = losses.size // 4
    calm, recent = float(np.median(bends[:-quarter])), float(np.median(bends[-quarter:]))
    levels = [float(np.median(losses[k : k + quarter])) for k in range(0, losses.size - quarter + 1, quarter)]
    if calm > 0.0 and recent / calm >= ROUGH and levels[-1] >= WENT_ON * levels[0]:
        text = f"Before the onset the noise of the loss had grown {recent / calm:.2g} times."
        return tell(case.episode.signal, text, FAIR, step=case.step, observed=recent, expected=calm)
    if min(levels) > 0.0 and levels[-1] >= ROSE * min(levels[:-1]):
        text = f"The loss was going up before the onset already: {levels[-1]:.3g} after {min(levels[:-1]):.3g}."
        return tell(case.episode.signal, text, FAIR, step=case.step, observed=levels[-1], expected=min(levels[:-1]))
    return None


def _later(case: Case, signal: str | None, *, borne: bool) -> Evidence | None:
    """That the run bore that rate later, so that it only came too soon; or that it never did."""
    told = None if signal is None else borne_later(case, signal)
    if told is None or told[1] is not borne:
        return None
    return tell(case.episode.signal, told[0], -STRONG if borne else FAIR, step=case.step)


def _often(case: Case) -> Evidence | None:
    if case.lone:
        return None
    like = [
        e for e in case.store.episodes if e.kind not in {EpisodeKind.OVERFIT, EpisodeKind.STALL} and e.period is None
    ]
    if len(like) < OFTEN or not finite(case.episode.severity):
        return None
    return tell(
        case.episode.signal,
        f"It is one of {len(like)} episodes in this run.",
        SLIGHT,
        step=case.step,
        observed=float(len(like)),
    )


def _change(case: Case, signal: str | None, rate: float | None) -> Change | None:
    if signal is None or rate is None or not rate > 0.0:
        return None
    return Change(setting=signal, value=lower_peak(case, signal, rate)[0])


def _fixes(case: Case, signal: str | None, rate: float | None) -> tuple[str, ...]:
    if signal is None or rate is None or not rate > 0.0:
        return tuple(filter(None, ("Lower the learning rate by a factor of 3.", clip_fix(case))))
    value, why = lower_peak(case, signal, rate)
    return tuple(filter(None, (f"Lower {signal} from {rate:.3g} to {value:g}: {why}.", clip_fix(case))))
