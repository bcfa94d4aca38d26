"""`lr_restart`: a periodic schedule comes back up."""

from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import FAIR, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix, lower_peak
from lightning_spike.diagnosis.observations.quiet import Shown
from lightning_spike.diagnosis.observations.rates import (
    PERIODIC,
    SCHEDULED,
    RateEvent,
    nearness,
    rate_event,
    shown_after_event,
)
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    lone_batch,
    rate_text,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, Evidence, Family
from lightning_spike.store import TrainerStateStore

FOLLOWS: Final = 16
"""Batches after a restart within which an episode counts as its doing."""


class LrRestart(Cause):
    """A periodic schedule comes back up: a cosine warm restart, the peak of a cyclic schedule.

    Seen by: the learning rate going up by its schedule (finding `restart` or `cyclic_peak`) at most a few updates before the loss; episodes that follow one
    restart after the other; a scheduler that is known to be periodic.

    Against it: no such event near; restarts of the same height before that the loss bore; a loss that was out for a single batch, so that no weights were
    damaged; a replay that gives the jump to the batch.

    Thresholds: within 4 batches the event is nearly certain to be the cause, within 16 likely; a rate that has stayed up counts for 64. A
    step is never blamed on an update that came after it.

    To do: lower the peak to a rate that this run has shown to bear, let peaks decay, or restart less often.
    """

    id: ClassVar = "lr_restart"
    family: ClassVar = Family.LEARNING_RATE
    tested_by: ClassVar = frozenset({"learning_rate", "intrinsic"})
    title: ClassVar = "The learning rate's restart"
    explains: ClassVar = frozenset({"lr_too_high", "warmup_too_short", "gradient_explosion", "numerical_instability"})

    @override
    def shown(self, store: TrainerStateStore) -> Shown | None:
        return shown_after_event(store, *SCHEDULED)

    @override
    def examine(self, case: Case) -> Examination:
        event = rate_event(case, SCHEDULED)
        if event is None:
            none_near = tell("lr", "No restart or peak of the learning rate stands near.", -STRONG, step=case.step)
            return Examination(evidence=(none_near,) if case.rate_signals else ())
        evidence = without_none(
            _event(case, event),
            _family(case),
            _scheduler(case),
            lone_batch(case, -FAIR),
            batch_value(case, ordinary=0.0, odd=-SLIGHT),
            split_verdict(case, {"data": -STRONG, "both": SLIGHT, "weights": FAIR, "noise": -FAIR}),
        )
        return Examination(
            evidence=evidence,
            summary=f"{event.kind.replace('_', ' ').capitalize()} of the schedule: {rate_text(event)}, and {case.loss_text}.",
            fixes=_fixes(case, event),
            change=Change(setting=event.signal, value=lower_peak(case, event.signal, event.after, event.ordinal)[0]),
            confirmed=False if case.split == "data" else None,
        )


def _event(case: Case, event: RateEvent) -> Evidence:
    weight = nearness(case, event)
    if event.factor is not None and event.factor < 2.0:  # noqa: PLR2004 - science.md 2.2: up by more than 2 is an event
        weight = SLIGHT
    return tell(
        event.signal, f"{rate_text(event)}.", weight, step=event.step, observed=event.after, expected=event.before
    )


def _family(case: Case) -> Evidence | None:
    """What the other restarts of the run did."""
    last = case.onset + len(case.store.history)
    others = [
        f
        for f in case.findings("learning_rate", *SCHEDULED, first=0, last=last)
        if not 0 <= case.onset - f.at.ordinal <= FOLLOWS
    ]
    if not others:
        return None
    onsets = [e.onset.ordinal for e in case.store.episodes]
    followed = sum(any(0 <= onset - f.at.ordinal <= FOLLOWS for onset in onsets) for f in others)
    share = followed / len(others)
    weight = FAIR if share >= 0.5 else -SLIGHT if followed == 0 else 0.0  # noqa: PLR2004 - most, or none
    text = f"Of {len(others)} other restarts or peaks in this run, {followed} were followed by an episode as well."
    return tell("lr", text, weight, step=case.step, observed=float(followed), expected=None)


def _scheduler(case: Case) -> Evidence | None:
    names = [s.class_name for s in case.facts.schedulers if s.class_name in PERIODIC]
    return (
        tell("lr", f"The schedule is {names[0]}, which comes back up by design.", SLIGHT, step=case.step)
        if names
        else None
    )


def _fixes(case: Case, event: RateEvent) -> tuple[str, ...]:
    value, why = lower_peak(case, event.signal, event.after, event.ordinal)
    first = f"Lower the peak of {event.signal} from {event.after:.3g} to {value:g}: {why}."
    factor = f"{value / event.after:.2g}" if event.after > 0.0 else "less than 1"
    second = f"Or let the peaks decay: multiply each restart's peak by {factor}; or restart less often (a larger T_0 or T_mult)."
    return tuple(filter(None, (first, second, clip_fix(case))))
