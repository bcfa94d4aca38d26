"""`resume_fault`: after a resume something is missing or has begun again."""

from collections.abc import Sequence
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, REACH, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.tells import batches, tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

STATE: Final = "optimizer_state"
SCHEDULE: Final = "schedule"
SOON: Final = 64
"""Batches after a resume in which what it lost shows in the loss: momenta settle in some 1 / (1 - beta), second moments in more; Lightning users tell of spikes within 50 steps (science.md 2)."""
LONG: Final = 400
"""Batches up to which it may: a second moment with beta2 = 0.999 needs a thousand to settle, a schedule that runs behind does so for good."""
COMPARED: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is there where the resume was compared with its checkpoint, if that had been written under the same watch."""


class ResumeFault(Cause):
    """After a resume something is missing or has begun again: optimizer state, schedule, learning rate.

    Seen by: what the checkpoint held (how many parameters had which state, its norm, the scheduler's place, the learning rates, all written into it) against what was there at the first
    batch of the resumed run. Without that summary: trouble in the first batches after a resume.

    Against it: a run that was not resumed; a resume that restored everything; trouble long after the resume.

    Thresholds: places and rates are compared as they are, norms to a thousandth (a state that is cast loses so much). Random states are never restored by Lightning and are not
    compared.

    To do: restore what is missing: hand the whole checkpoint to `fit(ckpt_path=...)`, or take the lost part from it.
    """

    id: ClassVar = "resume_fault"
    family: ClassVar = Family.ENVIRONMENT
    title: ClassVar = "A resume that lost something"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset(
        {
            "lr_scheduler_fault",
            "lr_restart",
            "lr_too_high",
            "warmup_too_short",
            "optimizer_state_corruption",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
            "gradient_explosion",
            "numerical_instability",
            "weight_blowup",
            "activation_saturation",
        }
    )
    standing: ClassVar = frozenset({("resume", STATE), ("resume", SCHEDULE)})

    @override
    def examine(self, case: Case) -> Examination:
        if case.facts.resumed_from is None:
            text = "The run was not resumed from a checkpoint."
            return Examination(evidence=(tell("resume", text, -DECISIVE, step=case.step),))
        since = _since(case)
        found = [f for kind in (STATE, SCHEDULE) for f in case.findings("resume", kind, first=0, last=case.last)]
        if not found:
            return Examination(
                evidence=without_none(_nothing(case), _soon(case, since)),
                summary=f"{batches(since).capitalize()} after the resume from step {case.facts.first_step} {case.loss_text}.",
                fixes=(_WHOLE,),
                change=Change(setting="code", value="resume"),
            )
        return Examination(
            evidence=tuple(_evidence(case, lost, since) for lost in found),
            summary=_summary(case, found, since),
            fixes=(*(_fix(case, lost) for lost in found), _WHOLE),
            change=Change(setting="code", value="resume"),
        )


_WHOLE: Final = (
    "Resume with `trainer.fit(module, ckpt_path=...)` from a checkpoint that was not saved with `save_weights_only=True`, and look at every `on_load_checkpoint` and `load_state_dict` "
    "of module and callbacks for what they leave out."
)


def _since(case: Case) -> int:
    """Batches from the first one of this fit to the onset."""
    ordinals = case.store.history.ordinals
    first = int(ordinals[0]) if ordinals.size else 0
    steps = case.step - case.facts.first_step
    return max(min(case.onset - first, steps * max(case.facts.accumulate_grad_batches, 1)), 0)


def _evidence(case: Case, lost: Finding, since: int) -> Evidence:
    text = lost.detail.get("text")
    words = text if isinstance(text, str) else "What was restored is not what was saved."
    near = not case.store.episodes or since <= SOON
    weight = DECISIVE + FAIR if near else STRONG if since <= LONG else FAIR
    saved, restored = (number(lost.detail.get(key)) for key in ("saved", "restored"))
    return tell(f"resume/{lost.kind}", words, weight, step=lost.at.step, observed=restored, expected=saved)


def _nothing(case: Case) -> Evidence:
    """The comparison found nothing; or the checkpoint was written without a summary, which cannot be told apart afterwards."""
    compared = any(signal in case.store.history.signals for signal in COMPARED)
    text = "What was restored was not seen to differ from what was saved."
    return tell("resume", text, -STRONG if compared else -FAIR, step=case.step)


def _soon(case: Case, since: int) -> Evidence | None:
    if since > REACH:
        return tell("resume", f"The loss rose {batches(since)} after the resume, not at it.", -SLIGHT, step=case.step)
    text = f"The loss rose {batches(since)} after the resume from step {case.facts.first_step}."
    return tell("resume", text, FAIR if since <= GUARD else SLIGHT, step=case.step, observed=float(since))


def _summary(case: Case, found: Sequence[Finding], since: int) -> str:
    what = {STATE: "the optimizer's state", SCHEDULE: "the schedule"}
    lost = " and ".join(dict.fromkeys(what[one.kind] for one in found))
    start = f"The resume at step {case.facts.first_step} did not restore {lost} as it was saved"
    return f"{start}; {batches(since)} later {case.loss_text}." if case.store.episodes else f"{start}."


def _fix(case: Case, lost: Finding) -> str:
    name = lost.detail.get("optimizer")
    of = f" of {name}" if isinstance(name, str) else ""
    if lost.kind == STATE:
        parts = lost.detail.get("what")
        named = ", ".join(map(str, parts)) if isinstance(parts, list | tuple) and parts else "its state"
        return f"Take the state{of} ({named}) from the checkpoint again: `trainer.optimizers[0].load_state_dict(checkpoint['optimizer_states'][0])`, before step {case.facts.first_step}."
    rate = number(lost.detail.get("rate_saved"))
    to = (
        ""
        if rate is None
        else f" and the learning rate{of} to {rate:.6g}, which it had when the checkpoint was written"
    )
    place = number(lost.detail.get("saved")) if lost.detail.get("what") == ["schedule"] else None
    at = "" if place is None else f" to {place:.0f}"
    return f"Set the scheduler back{at} (`scheduler.load_state_dict(checkpoint['lr_schedulers'][0])`){to}."
