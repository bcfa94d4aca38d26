"""`resume_fault`: a resume lost or restarted something: optimizer state, schedule, learning rate.

Seen by: what the checkpoint held (number of parameters with each state, its norm, the scheduler's place, the learning
rates, all written into it) against the first batch of the resumed run. Without that summary: an episode in the first
batches after a resume.

Against it: a run that was not resumed; a resume that restored everything; an episode long after the resume.

Thresholds: places and rates are compared exactly, norms to a thousandth (a cast of the state loses so much). Lightning
never restores random states, so they are not compared.

To do: restore what is missing: hand the whole checkpoint to `fit(ckpt_path=...)`, or take the lost part from it.
"""

from typing import Final

from lightning_spike.diagnosis.batch_ranges import GUARD, REACH
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, Observer, observer, premise
from lightning_spike.diagnosis.observations.outside import is_watched
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

STATE: Final = "optimizer_state"
SCHEDULE: Final = "schedule"
LOST: Final = {STATE: "the optimizer's state", SCHEDULE: "the schedule"}
SOON_BATCHES: Final = 64
"""Batches after a resume in which the loss shows what was lost: spikes come within 50 steps (science.md 2.2)."""
LATE_BATCHES: Final = 400
"""Batches up to which it may: a second moment with beta2 = 0.999 needs a thousand to settle, a schedule that lags does
so for good; engineering choice."""
WHOLE: Final = (
    "Resume with `trainer.fit(module, ckpt_path=...)` from a checkpoint saved without `save_weights_only=True`. Look "
    "at every `on_load_checkpoint` and `load_state_dict` of module and callbacks for what they leave out."
)


resumed = premise(
    "resumed", lambda view: view.facts.resumed_from is not None, "not resumed",
    "The run was not resumed from a checkpoint.", signal="resume",
)  # fmt: skip
"""The premise: a resumed run."""


def _lost(kind: str) -> Observer:
    """Observe one kind of loss at a resume."""

    def observe(view: EpisodeView) -> Observation | None:
        found = next((f for f in view.once(_findings) if f.kind == kind), None)
        if found is None:
            return None
        restored, saved = found.number("restored"), found.number("saved")
        return Observation(found.text, level=_lost_level(view), step=found.at.step, observed=restored, expected=saved)

    return Observer(f"lost_{kind}", ("soon", "late", "long after"), observe, f"resume/{kind}")


def _lost_level(view: EpisodeView) -> str:
    since = _since(view)
    if not view.store.episodes or since <= SOON_BATCHES:
        return "soon"
    return "late" if since <= LATE_BATCHES else "long after"


@observer("no difference", "not compared", signal="resume")
def restored(view: EpisodeView) -> Observation | None:
    """A comparison that found nothing, or a checkpoint without a summary."""
    if view.once(_findings):
        return None
    text = "No difference was seen between what was saved and what was restored."
    return Observation(text, level="no difference" if is_watched(view) else "not compared")


@observer("at the resume", "soon after", "long after", signal="resume")
def distance(view: EpisodeView) -> Observation | None:
    """How long after the resume the loss rose, where nothing else is known."""
    if view.once(_findings):
        return None
    since = _since(view)
    level = "soon after" if since <= REACH else "long after"
    level = "at the resume" if since <= GUARD else level
    text = f"The loss rose {batches(since)} after the resume from step {view.facts.first_step}."
    return Observation(text, level=level, observed=float(since))


def _findings(view: EpisodeView) -> tuple[Finding, ...]:
    return tuple(f for kind in LOST for f in view.findings("resume", kind, first=0, last=view.last))


def _since(view: EpisodeView) -> int:
    """Batches from the first one of this fit to the onset."""
    ordinals = view.store.history.ordinals
    first = int(ordinals[0]) if ordinals.size else 0
    steps = view.step - view.facts.first_step
    return max(min(view.onset - first, steps * max(view.facts.accumulate_grad_batches, 1)), 0)


def _summary(view: EpisodeView) -> str:
    since, found = batches(_since(view)), view.once(_findings)
    if not found:
        return f"{since.capitalize()} after the resume from step {view.facts.first_step}, {view.loss_text}."
    lost = " and ".join(dict.fromkeys(LOST[one.kind] for one in found))
    start = f"The resume at step {view.facts.first_step} did not restore {lost} as it was saved"
    return f"{start}; {since} later {view.loss_text}." if view.store.episodes else f"{start}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    change = Change(setting="code", value="resume")
    texts = (*(_restore(view, lost) for lost in view.once(_findings)), WHOLE)
    return tuple(Fix(text, change) for text in texts)


def _restore(view: EpisodeView, lost: Finding) -> str:
    name = lost.detail.get("optimizer")
    of = f" of {name}" if isinstance(name, str) else ""
    parts = lost.names("what")
    if lost.kind == STATE:
        named = ", ".join(parts) or "its state"
        return (
            f"Take the state{of} ({named}) from the checkpoint: `trainer.optimizers[0].load_state_dict("
            f"checkpoint['optimizer_states'][0])`, before step {view.facts.first_step}."
        )
    rate, place = lost.number("rate_saved"), lost.number("saved")
    to = "" if rate is None else f" and the learning rate{of} to {rate:.6g}, its value in the checkpoint"
    at = "" if place is None or parts != ("schedule",) else f" to {place:.0f}"
    return f"Set the scheduler back{at} (`scheduler.load_state_dict(checkpoint['lr_schedulers'][0])`){to}."


CAUSE: Final = Cause(
    id="resume_fault",
    family=Family.ENVIRONMENT,
    title="A resume that lost something",
    meaning="a resume lost or restarted data order, optimizer state, schedule or random state",
    requires=(resumed,),
    observations=(_lost(STATE), _lost(SCHEDULE), restored, distance),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({
        "lr_scheduler_fault", "lr_restart", "warmup_too_short", "optimizer_state_corruption", "stale_second_moment",
        "adam_epsilon_too_small", "momentum_reversal", "weight_blowup", "activation_saturation",
    }),
    sufficient_findings=frozenset({("resume", STATE), ("resume", SCHEDULE)}),
)  # fmt: skip
