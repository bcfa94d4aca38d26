"""`lr_scheduler_fault`: the schedule jumps where no schedule should."""

import math
from typing import ClassVar

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import FAIR, NEAR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.quiet import Shown
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
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
from lightning_spike.records import Change, Evidence, Family, Finding
from lightning_spike.store import TrainerStateStore


class LrSchedulerFault(Cause):
    """The schedule jumps where no schedule should: a bug, a wrong interval, a bad resume, code of one's own.

    Seen by: a learning rate that went up by more than any configured schedule explains, or that is not a finite number, at most a few updates before
    the loss (findings `unexplained_jump`, `nonfinite`).

    A schedule that counts batches where epochs were meant (finding `wrong_interval`) is one too, though each of its moves is by design.

    Against it: no such event near; a loss that was out for a single batch; a replay that gives the jump to the batch. A restart by
    schedule is `lr_restart`.

    Thresholds: as `lr_restart`; a rate up by a factor of 2 in one update is an event (science.md 2.2).

    To do: find what set the rate; the value that the schedule had before is named. Check `interval` ("step" or "epoch") and what a resume restored.
    """

    id: ClassVar = "lr_scheduler_fault"
    family: ClassVar = Family.LEARNING_RATE
    tested_by: ClassVar = frozenset({"learning_rate", "intrinsic"})
    title: ClassVar = "A jump of the learning rate that no schedule explains"
    explains: ClassVar = frozenset({"lr_too_high", "warmup_too_short", "gradient_explosion", "numerical_instability"})

    @override
    def shown(self, store: TrainerStateStore) -> Shown | None:
        return shown_after_event(store, *JUMPS)

    @override
    def examine(self, case: Case) -> Examination:
        misread = _misread(case)
        event = rate_event(case, JUMPS if misread is None else JUMPS + SCHEDULED)
        if event is None:
            none_near = tell("lr", "The learning rate did not jump against its schedule.", -STRONG, step=case.step)
            return Examination(evidence=(none_near,) if case.rate_signals else ())
        evidence = without_none(
            _event(case, event),
            _wrong_interval(misread),
            _resumed(case, event),
            lone_batch(case, -FAIR),
            batch_value(case, ordinary=0.0, odd=-SLIGHT),
            split_verdict(case, {"data": -STRONG, "both": SLIGHT, "weights": FAIR, "noise": -FAIR}),
        )
        return Examination(
            evidence=evidence,
            summary=f"No schedule explains it: {rate_text(event)}, and {case.loss_text}.",
            fixes=_fixes(case, event, misread),
            change=Change(setting="schedule", value=event.before),
            confirmed=False if case.split == "data" else None,
        )


def _event(case: Case, event: RateEvent) -> Evidence:
    weight = nearness(case, event)
    if event.factor is not None and event.factor < 2.0:  # noqa: PLR2004 - science.md 2.2
        weight = SLIGHT
    observed = event.after if math.isfinite(event.after) else None
    text = f"{rate_text(event)}; no configured schedule does that."
    return tell(event.signal, text, weight, step=event.step, observed=observed, expected=event.before)


def _misread(case: Case) -> Finding | None:
    """The newest finding that a schedule counts batches where epochs were meant, or the reverse."""
    found = case.findings("learning_rate", "wrong_interval", first=0, last=case.onset)
    return found[-1] if found else None


def _wrong_interval(misread: Finding | None) -> Evidence | None:
    if misread is None:
        return None
    configured, setting, value = (misread.detail.get(key) for key in ("configured", "setting", "value"))
    length = f", though {setting} = {value} looks meant for the other" if setting is not None else ""
    text = f"The schedule is configured to move once per {configured}{length}."
    return tell(f"lr-{misread.detail.get('name')}", text, FAIR, step=misread.at.step)


def _resumed(case: Case, event: RateEvent) -> Evidence | None:
    if case.facts.resumed_from is None or event.step - case.facts.first_step > NEAR:
        return None
    return tell(
        event.signal, f"The run was resumed at step {case.facts.first_step}, just before.", SLIGHT, step=event.step
    )


def _fixes(case: Case, event: RateEvent, misread: Finding | None) -> tuple[str, ...]:
    steady = "its schedule's value" if event.before is None else f"{event.before:.3g}, its value at the update before"
    named = ", ".join(
        f"{s.class_name} (interval '{s.interval}', frequency {s.frequency})" for s in case.facts.schedulers
    )
    schedules = (
        f"The configured schedules are: {named}."
        if named
        else "No schedule is configured, so code of your own or a resume set it."
    )
    if misread is not None:
        configured = misread.detail.get("configured")
        meant = "epoch" if configured == "step" else "step"
        swap = f"In configure_optimizers return the scheduler with interval '{meant}' in place of '{configured}', or give its lengths in {configured}s."
        return (swap, f"Go on from a checkpoint from before step {event.step}.")
    return (
        f"Find what set {event.signal} to {event.after:.3g} at step {event.step}, and put it back to {steady}.",
        f"{schedules} Check the interval, and what on_train_batch_start/end or a resume do to param_groups['lr'].",
        f"Go on from a checkpoint from before step {event.step}.",
    )
