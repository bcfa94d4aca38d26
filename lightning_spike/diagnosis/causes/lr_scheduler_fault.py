"""`lr_scheduler_fault`: the rate jumps where no schedule should: a bug, a wrong interval, a bad resume, user code.

Seen by: a learning rate that rose by more than any configured schedule explains, or that is not finite, at most a few
updates before the loss (findings `unexplained_jump`, `nonfinite`). A schedule that counts batches where epochs were
meant (finding `wrong_interval`) counts too, though each of its moves is by design.

Against it: no such event near; a loss that was out of its range for a single batch; a replay that gives the jump to the
batch. A restart by schedule is `lr_restart`.

Thresholds: as `lr_restart`; a rate up by a factor of 2 in one update is an event (science.md 2.2).

To do: find what set the rate; the value that the schedule had before is named. Check `interval` ("step" or "epoch") and
what a resume restored.
"""

from typing import Final

from lightning_spike.diagnosis.batch_ranges import NEAR
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer, premise
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.rates import (
    JUMPS,
    NEARNESS,
    SCHEDULED,
    RateEvent,
    rate_event,
    shown_after_event,
)
from lightning_spike.diagnosis.observations.shared_evidence import (
    batch_values,
    event_observation,
    rate_text,
    transient_loss,
)
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family, Finding

unscheduled_jump = premise(
    "unscheduled_jump", lambda view: view.once(_event) is not None, "none",
    "The learning rate did not jump against its schedule.", signal="lr",
)  # fmt: skip
"""The premise: a jump of the rate near the onset."""


@observer(*NEARNESS)
def jump(view: EpisodeView) -> Observation | None:
    """The jump, by its distance to the onset."""
    event = view.once(_event)
    if event is None:
        return None
    return event_observation(view, event, f"{rate_text(event)}; no configured schedule does that.")


@observer("wrong")
def interval(view: EpisodeView) -> Observation | None:
    """A schedule that counts batches where epochs were meant, or the reverse."""
    found = view.once(_wrong_interval)
    if found is None:
        return None
    configured, setting, value = (found.detail.get(key) for key in ("configured", "setting", "value"))
    length = "" if setting is None else f", though {setting} = {value} looks meant for the other"
    text = f"The schedule is configured to move once per {configured}{length}."
    return Observation(text, signal=f"lr-{found.detail.get('name')}", step=found.at.step)


@observer("just before")
def resume(view: EpisodeView) -> Observation | None:
    """A resume just before the jump."""
    event = view.once(_event)
    if event is None or view.facts.resumed_from is None or event.step - view.facts.first_step > NEAR:
        return None
    text = f"The run was resumed at step {view.facts.first_step}, just before."
    return Observation(text, signal=event.signal, step=event.step)


def _event(view: EpisodeView) -> RateEvent | None:
    return rate_event(view, JUMPS if view.once(_wrong_interval) is None else JUMPS + SCHEDULED)


def _wrong_interval(view: EpisodeView) -> Finding | None:
    found = view.findings("learning_rate", "wrong_interval", first=0, last=view.onset)
    return found[-1] if found else None


def _summary(view: EpisodeView) -> str:
    event = view.once(_event)
    what = "the learning rate jumped" if event is None else rate_text(event)
    return f"No schedule explains it: {what}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    event, wrong = view.once(_event), view.once(_wrong_interval)
    if event is None:
        return ()
    change = Change(setting="schedule", value=event.before)
    go_back = Fix(f"Go on from a checkpoint from before step {event.step}.")
    if wrong is not None:
        return (Fix(_swap_text(wrong), change), go_back)
    steady = "its schedule's value" if event.before is None else f"{event.before:.3g}, its value at the update before"
    find = f"Find what set {event.signal} to {event.after:.3g} at step {event.step}, and set it back to {steady}."
    check = "Check the interval, and what on_train_batch_start/end or a resume do to param_groups['lr']."
    return Fix(find, change), Fix(f"{_schedules(view)} {check}"), go_back


def _swap_text(wrong: Finding) -> str:
    configured = wrong.detail.get("configured")
    meant = "epoch" if configured == "step" else "step"
    return (
        f"In configure_optimizers return the scheduler with interval '{meant}' in place of '{configured}', "
        f"or give its lengths in {configured}s."
    )


def _schedules(view: EpisodeView) -> str:
    if not view.facts.schedulers:
        return "No schedule is configured, so user code or a resume set it."
    named = (f"{s.class_name} (interval '{s.interval}', frequency {s.frequency})" for s in view.facts.schedulers)
    return f"The configured schedules are: {', '.join(named)}."


TESTED_BY: Final = frozenset({Group.LEARNING_RATE, Group.INTRINSIC})

CAUSE: Final = Cause(
    id="lr_scheduler_fault",
    family=Family.LEARNING_RATE,
    title="A jump of the learning rate that no schedule explains",
    meaning="the schedule jumps unintentionally: a bug, a wrong interval, a bad resume",
    requires=(unscheduled_jump,),
    observations=(jump, interval, resume, transient_loss, batch_values, split_of_jump(TESTED_BY)),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"lr_too_high", "warmup_too_short"}),
    tested_by=TESTED_BY,
    shown=lambda store: shown_after_event(store, *JUMPS),
)
