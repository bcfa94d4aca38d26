"""`optimizer_state_corruption`: the optimizer's state changed other than by its own step."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, REACH, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.outside import OutsideChange, last_write, outside_change
from lightning_spike.diagnosis.observations.tells import batches, split_verdict, tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

AT_ONCE: Final = 2
"""Batches from a write into the state to the first loss that shows it: the update after it, and one more where it was small."""
HABIT: Final = 2
"""Writes in a run from which on they are somebody's practice, a reset of the momentum every so often, and show nothing by themselves."""
NONE: Final = 0.1
"""Share of the jump up to which the lab's experiments refute a cause."""
STATE: Final = ("optimizer", "momentum_or_gradient")
"""What the lab's experiment finds to be changed where it is the state, or may be."""
SNAPSHOT: Final = "snapshot/finite"
WATCHED: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is there where the writes were watched."""


class OptimizerStateCorruption(Cause):
    """The optimizer's state changed other than by its own step: a shard restored in other units or in another order, a torn write, code that rescales it.

    Seen by: torch's version counters, which say that momenta or second moments were written to in place while the optimizer did not step (finding `outside_writes`,
    `optimizer_state`), a batch or two before the loss rose; a re-run without the write in which the loss stays where it was; the experiment that finds the state, and not the
    weights, to be what changed. The write alone shows it too, where the loss has borne it.

    Against it: nobody wrote, though that was watched; a write long before the loss rose; the same write every so often, as of one who resets momenta on purpose.

    Thresholds: the check is exact; that a write comes two batches before the loss by chance is as rare as such writes are. What a rollback or a resume writes is not counted.

    To do: take the state back to that of the last snapshot before the write, or begin with an empty one; find who writes: the tensors and the steps between which it was are named.
    """

    id: ClassVar = "optimizer_state_corruption"
    family: ClassVar = Family.OPTIMIZER
    title: ClassVar = "A corrupt optimizer state"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    tested_by: ClassVar = frozenset({"optimizer"})
    explains: ClassVar = frozenset(
        {
            "gradient_explosion",
            "lr_too_high",
            "warmup_too_short",
            "numerical_instability",
            "activation_saturation",
            "weight_blowup",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
        }
    )
    standing: ClassVar = frozenset(
        {("outside_writes", "optimizer_state"), ("outside_writes", "optimizer_state_at_validation")}
    )

    @override
    def examine(self, case: Case) -> Examination:
        written, change = last_write(case, "optimizer_state"), outside_change(case)
        found = None if written is None else written[0]
        evidence = without_none(
            _write(case, found) if found is not None else _nobody(case),
            _replayed(case, change, found),
            _not_yet_examined(case, found),
            _longer(case, found),
            _weights_too(case, found),
            split_verdict(case, {"data": -STRONG, "noise": -SLIGHT}),
        )
        return Examination(
            evidence=evidence,
            summary=_summary(case, found),
            fixes=_fixes(case, found),
            change=Change(setting="optimizer_state", value=_healthy_step(case, found)),
        )


def _write(case: Case, found: Finding) -> Evidence:
    text = found.detail.get("text")
    words = text if isinstance(text, str) else "The optimizer's state was written to outside of its step."
    return tell(
        "outside_writes/optimizer_state",
        f"{_when(case, found)}: {words}",
        _weight(case, found),
        step=found.at.step,
        observed=_count(found),
        expected=0.0,
    )


def _weight(case: Case, found: Finding) -> float:
    lag = case.onset - found.at.ordinal
    often = sum(f.detector == "outside_writes" and f.kind.startswith("optimizer_state") for f in case.store.findings)
    if not case.store.episodes:
        return DECISIVE if often <= HABIT else SLIGHT
    if 0 <= lag <= AT_ONCE:
        return DECISIVE + FAIR
    if often > HABIT:
        return 0.0
    return STRONG if -GUARD <= lag <= REACH else SLIGHT


def _when(case: Case, found: Finding) -> str:
    if not case.store.episodes:
        return f"At step {found.at.step}"
    lag = case.onset - found.at.ordinal
    return f"At step {found.at.step}, {f'{batches(lag)} before the loss rose' if lag > 0 else 'as the loss rose'}"


def _count(found: Finding) -> float | None:
    count = found.detail.get("count")
    return float(count) if isinstance(count, int) else None


def _nobody(case: Case) -> Evidence:
    if any(signal in case.store.history.signals for signal in WATCHED):
        text = "Nobody but the optimizer wrote into its state, which was watched at every batch."
        return tell("outside_writes", text, -DECISIVE, step=case.step, observed=0.0)
    return tell("outside_writes", "Nobody was seen writing into the optimizer's state.", -STRONG, step=case.step)


def _replayed(case: Case, change: OutsideChange | None, found: Finding | None) -> Evidence | None:
    """Only where the experiment itself says so: whose share of the jump it is, is told by the blame."""
    if change is None or change.changed is None:
        return None
    if change.changed not in STATE:
        return tell("lab/outside", change.text, -STRONG, step=case.step, observed=change.repaired)
    weight = STRONG if change.changed == "optimizer" else SLIGHT if found is None else FAIR
    return tell("lab/outside", change.text, weight, step=case.step, observed=change.repaired)


def _not_yet_examined(case: Case, found: Finding | None) -> Evidence | None:
    """What the experiments say of later updates refutes no write before them: its harm was done, and the state made up of new gradients again."""
    first = number((case.lab("factors") or {}).get("ordinal"))
    if found is None or first is None or not case.blame or first - found.at.ordinal <= AT_ONCE:
        return None
    if case.blame.get("optimizer", 0.0) > NONE:
        return None
    text = f"The experiments begin at step {case.step_of(int(first))}, {batches(int(first) - found.at.ordinal)} after it, and say nothing about the updates before."
    return tell("lab/factors", text, STRONG, step=case.step)


def _longer(case: Case, found: Finding | None) -> Evidence | None:
    """An update after the write that was longer than usual, before the loss showed anything."""
    if found is None or not 0 <= case.onset - found.at.ordinal <= REACH:
        return None
    size = case.worst("update_norm", found.at.ordinal, case.onset)
    if size is None or not size.above:
        return None
    text = f"After it an update was {size.ratio:.3g} times as long as usual."
    return tell("update_norm", text, FAIR, step=case.step, observed=size.observed, expected=size.expected)


def _weights_too(case: Case, found: Finding | None) -> Evidence | None:
    """Who writes into weights and state at once loads a checkpoint, or starts over."""
    weights = last_write(case, "weights")
    if found is None or weights is None or weights[0].at.ordinal != found.at.ordinal:
        return None
    return tell("outside_writes/weights", "The weights were written to at the same time.", -FAIR, step=found.at.step)


def _healthy_step(case: Case, found: Finding | None) -> float | None:
    """The step of the newest snapshot of finite values from before the write."""
    until = (case.onset - 1 if found is None else found.at.ordinal) if case.store.episodes or found is not None else -1
    history = case.store.history
    fine = history.ordinals[(history.series(SNAPSHOT) == 1.0) & (history.ordinals <= until)]
    return float(case.step_of(int(fine[-1]))) if fine.size else None


def _summary(case: Case, found: Finding | None) -> str:
    then = f", and {case.loss_text}" if case.store.episodes else ""
    if found is None:
        return f"The optimizer's state changed shortly before step {case.step} other than by its own step{then}."
    count = _count(found)
    many = f"{count:.0f} tensors of the optimizer's state" if count is not None else "The optimizer's state"
    was = "were" if count is not None and not math.isclose(count, 1.0) else "was"
    return f"{many} {was} written to outside of its step between step {found.at.step} and the next{then}."


def _fixes(case: Case, found: Finding | None) -> tuple[str, ...]:
    step = _healthy_step(case, found)
    back = (
        f"Take weights and optimizer back to the state of step {step:.0f}, the last snapshot before it (AnomalyRollback does so by itself)."
        if step is not None
        else "Go on from the last checkpoint before it, or with an empty optimizer state and a short warm-up."
    )
    listed = None if found is None else found.detail.get("names")
    names = [f"`{name}`" for name in listed[:3]] if isinstance(listed, list | tuple) else []
    where = f" in {', '.join(names)}" if names else ""
    when = f" between step {found.at.step} and the next" if found is not None else ""
    who = (
        f"Find what writes into `optimizer.state`{when}{where}: a callback, a hook, code that restores, shards or rescales the state; a state that is loaded must have the "
        "same order of parameters and the same units."
    )
    return back, who
