"""`optimizer_state_corruption`.

The optimizer's state changed other than by its own step: a shard restored in other units or another order, a torn
write, code that rescales it.

Seen by: torch's version counters, which say that momenta or second moments were written to in place while the optimizer
did not step (finding `outside_writes`, `optimizer_state`), a batch or two before the loss rose; a replay without the
write in which the loss stays where it was; the experiment that finds the state changed, and not the weights. The write
alone shows it too, where the loss has tolerated it.

Against it: no write, though that was watched; a write long before the loss rose; the same write every so often, as by
code that resets momenta on purpose.

Thresholds: the check is exact; that a write comes two batches before the loss by chance is as rare as such writes are.
Writes of a rollback or a resume are not counted.

To do: take the state back from the last snapshot before the write, or begin with an empty one; find the code that
writes: the tensors and the steps between are named.
"""

from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.constants import GUARD, REACH
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import last_write, outside_change
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

AT_ONCE: Final = 2
"""Batches from a write into the state to the first loss that shows it: the update after it, and one more where it was
small; engineering choice."""
MAX_HABITUAL_WRITES: Final = 2
"""Writes in a run above which they are a practice, as a regular reset of the momentum, and show nothing alone;
engineering choice."""
STATE: Final = ("optimizer", "momentum_or_gradient")
"""What the experiment finds to be changed where it is the state, or may be."""
SNAPSHOT: Final = "snapshot/finite"
WATCHED: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is there where writes were watched."""
NAMED: Final = 3
"""Tensors that are named; engineering choice."""


@observer("just before", "near", "distant", "habitual", "no episode", "no episode, habitual", "none, watched", "none")
def write(view: EpisodeView) -> Observation | None:
    """The last write into the state outside of the optimizer's step."""
    found = view.once(_write)
    if found is None:
        return _no_write(view)
    when = f"At step {found.at.step}"
    if view.store.episodes:
        lag = view.onset - found.at.ordinal
        when += f", {batches(lag)} before the loss rose" if lag > 0 else ", as the loss rose"
    return Observation(
        level=_write_level(view, found), text=f"{when}: {found.text}", signal="outside_writes/optimizer_state",
        step=found.at.step, observed=found.number("count"), expected=0.0,
    )  # fmt: skip


def _write_level(view: EpisodeView, found: Finding) -> str:
    lag = view.onset - found.at.ordinal
    kinds = [f.kind for f in view.store.findings if f.detector == "outside_writes"]
    habitual = sum(kind.startswith("optimizer_state") for kind in kinds) > MAX_HABITUAL_WRITES
    if not view.store.episodes:
        return "no episode, habitual" if habitual else "no episode"
    if 0 <= lag <= AT_ONCE:
        return "just before"
    if habitual:
        return "habitual"
    return "near" if -GUARD <= lag <= REACH else "distant"


def _no_write(view: EpisodeView) -> Observation:
    watched = any(signal in view.store.history.signals for signal in WATCHED)
    text = "No code but the optimizer was seen to write into its state."
    level = "none, watched" if watched else "none"
    return Observation(level=level, text=text, signal="outside_writes", step=view.step, observed=0.0)


@observer("optimizer state", "state or gradient", "state or gradient, written", "something else")
def changed(view: EpisodeView) -> Observation | None:
    """What the experiment found to be changed."""
    change = outside_change(view)
    if change is None or change.kind is None:
        return None
    level = "something else"
    if change.kind == "optimizer":
        level = "optimizer state"
    elif change.kind in STATE:
        level = "state or gradient" if view.once(_write) is None else "state or gradient, written"
    text = sentences.outside_change(change)
    return Observation(level=level, text=text, signal="lab/outside_change", step=view.step, observed=change.repaired)


@observer("later updates only")
def examined_updates(view: EpisodeView) -> Observation | None:
    """An attribution of later updates refutes no write before them.

    Its harm was done, and the state made up of new gradients again.
    """
    found = view.once(_write)
    attribution = None if view.experiments is None else view.experiments.attribution
    if found is None or attribution is None or not view.shares:
        return None
    lag = attribution.ordinal - found.at.ordinal
    if lag <= AT_ONCE or view.shares.get(Group.OPTIMIZER, 0.0) > judgement.REFUTING_SHARE:
        return None
    text = f"The experiments begin {batches(lag)} after the write and say nothing about the updates before."
    return Observation(level="later updates only", text=text, signal="lab/attribution", step=view.step)


@observer("long update")
def update_after(view: EpisodeView) -> Observation | None:
    """An update after the write that was longer than usual, before the loss showed anything."""
    found = view.once(_write)
    if found is None or not 0 <= view.onset - found.at.ordinal <= REACH:
        return None
    size = view.worst("update_norm", found.at.ordinal, view.onset)
    if size is None or not size.above:
        return None
    text = f"After it an update was ×{size.ratio:.3g} as long as usual."
    return Observation(
        level="long update",
        text=text,
        signal="update_norm",
        step=view.step,
        observed=size.observed,
        expected=size.expected,
    )


@observer("weights too")
def weights_written(view: EpisodeView) -> Observation | None:
    """Code that writes into weights and state at once loads a checkpoint, or starts over."""
    found, weights = view.once(_write), last_write(view, "weights")
    if found is None or weights is None or weights[0].at.ordinal != found.at.ordinal:
        return None
    text = "The weights were written to at the same time."
    return Observation(level="weights too", text=text, signal="outside_writes/weights", step=found.at.step)


def _write(view: EpisodeView) -> Finding | None:
    written = last_write(view, "optimizer_state")
    return None if written is None else written[0]


def _healthy_step(view: EpisodeView) -> float | None:
    """The step of the newest snapshot of finite values from before the write."""
    found = view.once(_write)
    until = -1
    if found is not None:
        until = found.at.ordinal
    elif view.store.episodes:
        until = view.onset - 1
    history = view.store.history
    fine = history.ordinals[(history.series(SNAPSHOT) == 1.0) & (history.ordinals <= until)]
    return float(view.step_of(int(fine[-1]))) if fine.size else None


def _summary(view: EpisodeView) -> str:
    found = view.once(_write)
    then = f", and {view.loss_text}" if view.store.episodes else ""
    if found is None:
        return f"The optimizer's state changed shortly before step {view.step} other than by its own step{then}."
    count = found.number("count")
    what = "The optimizer's state was"
    if count is not None:
        what = f"{count:.0f} tensor{' of the state was' if count == 1 else 's of the state were'}"
    return f"{what} written to outside of the optimizer's step between step {found.at.step} and the next{then}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    step, found = _healthy_step(view), view.once(_write)
    back = "Go on from the last checkpoint before it, or with an empty optimizer state and a short warm-up."
    if step is not None:
        back = f"Take weights and optimizer back to the state of step {step:.0f}, the last snapshot before it (AnomalyRollback does so)."
    when = "" if found is None else f" between step {found.at.step} and the next"
    names = () if found is None else found.names()[:NAMED]
    where = f" in {', '.join(f'`{name}`' for name in names)}" if names else ""
    return (
        Fix(back, Change(setting="optimizer_state", value=step)),
        Fix(
            f"Find what writes into `optimizer.state`{when}{where}: a callback, a hook, code that restores, shards or rescales "
            "the state; a loaded state must have the same order of parameters and the same units."
        ),
    )


TESTED_BY: Final = frozenset({Group.OPTIMIZER})

CAUSE: Final = Cause(
    id="optimizer_state_corruption",
    family=Family.OPTIMIZER,
    title="A corrupt optimizer state",
    meaning="the optimizer state changed other than by its own step",
    observations=(write, changed, examined_updates, update_after, weights_written, split_of_jump(TESTED_BY)),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset(
        {
            "warmup_too_short",
            "numerical_instability",
            "activation_saturation",
            "weight_blowup",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
        }
    ),
    tested_by=TESTED_BY,
    sufficient_findings=frozenset(
        {("outside_writes", "optimizer_state"), ("outside_writes", "optimizer_state_at_validation")}
    ),
)
