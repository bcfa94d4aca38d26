"""`lr_restart`: a periodic schedule rises again: a cosine warm restart, the peak of a cyclic schedule.

Seen by: a learning rate that rises by its schedule (finding `restart` or `cyclic_peak`) at most a few updates before
the loss; episodes after several restarts; a scheduler that is known to be periodic.

Against it: no such event near; earlier restarts of the same height that the run tolerated; a loss that was out of its
range for a single batch, so that no weights were damaged; a replay that gives the jump to the batch.

Thresholds: within 4 batches the event is nearly certain to be the cause, within 16 likely; a rate that has stayed up
counts for 64. An update after the onset is never the cause.

To do: lower the peak to a rate that this run tolerated, let peaks decay, or restart less often.
"""

from typing import Final

from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, lower_peak
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer, premise
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.rates import (
    NEARNESS,
    PERIODIC,
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
from lightning_spike.records import Change, Family

FOLLOWS_WITHIN: Final = 16
"""Batches after a restart within which an episode counts as its effect; engineering choice."""
MOST_RESTARTS_SHARE: Final = 0.5
"""Share of the other restarts that caused an episode from which restarts cause episodes in this run;
engineering choice."""


scheduled_rise = premise(
    "scheduled_rise", lambda view: view.once(_event) is not None, "none",
    "No restart or peak of the learning rate is near.", signal="lr",
)  # fmt: skip
"""The premise: a restart or a peak near the onset."""


@observer(*NEARNESS)
def restart(view: EpisodeView) -> Observation | None:
    """The restart, by its distance to the onset."""
    event = view.once(_event)
    return None if event is None else event_observation(view, event, f"{rate_text(event)}.")


@observer("caused episodes", "caused some", "caused none", signal="lr")
def other_restarts(view: EpisodeView) -> Observation | None:
    """How many of the other restarts caused an episode."""
    found = view.findings("learning_rate", *SCHEDULED, first=0, last=view.onset + len(view.store.history))
    others = [f for f in found if not 0 <= view.onset - f.at.ordinal <= FOLLOWS_WITHIN]
    if not others:
        return None
    onsets = [e.onset.ordinal for e in view.store.episodes]
    followed = sum(any(0 <= onset - f.at.ordinal <= FOLLOWS_WITHIN for onset in onsets) for f in others)
    level = "caused some" if followed else "caused none"
    level = "caused episodes" if followed >= MOST_RESTARTS_SHARE * len(others) else level
    return Observation(_others_text(followed, len(others)), level=level, observed=float(followed))


def _others_text(followed: int, others: int) -> str:
    if others == 1:
        return f"The other restart in this run caused {'an episode too' if followed else 'no episode'}."
    return f"{followed} of the {others} other restarts in this run caused an episode."


@observer("periodic", signal="lr")
def periodic_scheduler(view: EpisodeView) -> Observation | None:
    """A scheduler that rises again by design."""
    name = next((s.class_name for s in view.facts.schedulers if s.class_name in PERIODIC), None)
    return None if name is None else Observation(f"The schedule is {name}, which rises again by design.")


def _event(view: EpisodeView) -> RateEvent | None:
    return rate_event(view, SCHEDULED)


def _summary(view: EpisodeView) -> str:
    event = view.once(_event)
    if event is None:
        return f"The learning rate rose again by its schedule, and {view.loss_text}."
    kind = event.kind.replace("_", " ").capitalize()
    return f"{kind} of the schedule: {rate_text(event)}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    event = view.once(_event)
    if event is None:
        return ()
    value, why = lower_peak(view, event.signal, event.after, event.ordinal)
    factor = f"{value / event.after:.2g}" if event.after > 0.0 else "less than 1"
    lower = f"Lower the peak of {event.signal} from {event.after:.3g} to {value:g}: {why}."
    decay = f"Or let the peaks decay: multiply each restart's peak by {factor}; or restart less often (T_0, T_mult)."
    return Fix(lower, Change(setting=event.signal, value=value)), Fix(decay), *clip_fix(view)


TESTED_BY: Final = frozenset({Group.LEARNING_RATE, Group.INTRINSIC})

CAUSE: Final = Cause(
    id="lr_restart",
    family=Family.LEARNING_RATE,
    title="The learning rate's restart",
    meaning="a periodic schedule comes back up: cosine warm restart, cyclic peak",
    requires=(scheduled_rise,),
    observations=(
        restart, other_restarts, periodic_scheduler, transient_loss, batch_values, split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"lr_too_high", "warmup_too_short"}),
    tested_by=TESTED_BY,
    shown=lambda store: shown_after_event(store, *SCHEDULED),
)  # fmt: skip
