"""`optimizer_state_corruption`: the optimizer's state changed other than by its own step.

Typical reasons: a shard restored in other units or another order, a torn write, code that rescales the state.

Seen by: torch's version counters, which say that momenta or second moments were written to in place while the optimizer
did not step (finding `outside_writes`, `optimizer_state`), a batch or two before the loss rose; a replay without the
write in which the loss stays low; the experiment that finds the state changed, and not the weights. The write alone
shows it too, where the loss has tolerated it.

Against it: no write, though that was watched; a write long before the loss rose; the same write again and again, as by
code that resets momenta on purpose.

Thresholds: the check is exact; such writes are too rare to come two batches before the loss rises by chance. Writes of
a rollback or a resume do not count.

To do: restore the state from the last snapshot before the write, or begin with an empty one; find the code that writes:
the tensors and the steps between are named.
"""

from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import GUARD, REACH
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import SHOWS_WITHIN, is_watched, last_write, named
from lightning_spike.diagnosis.observations.shared_evidence import batches, before_rise
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

MAX_HABITUAL_WRITES: Final = 2
"""Writes in a run above which they are intended, as a regular reset of the momentum, and show nothing alone;
engineering choice."""
STATE: Final = ("optimizer", "momentum_or_gradient")
"""What the experiment finds changed where it is the state, or may be."""
SNAPSHOT: Final = "snapshot/finite"


@observer("just before", "near", "distant", "habitual", "no episode", "no episode, habitual", "none, watched", "none")
def write(view: EpisodeView) -> Observation | None:
    """The last write into the state outside the optimizer's step."""
    found = view.once(_write)
    if found is None:
        text, level = "No code but the optimizer was seen to write into its state.", "none"
        level = "none, watched" if is_watched(view) else level
        return Observation(text, level=level, signal="outside_writes", observed=0.0)
    when = before_rise(view.onset - found.at.ordinal) if view.store.episodes else ""
    text, signal = f"At step {found.at.step}{when}: {found.text}", "outside_writes/optimizer_state"
    level, count = _write_level(view, found), found.number("count")
    return Observation(text, level=level, signal=signal, step=found.at.step, observed=count, expected=0.0)


def _write_level(view: EpisodeView, found: Finding) -> str:
    lag = view.onset - found.at.ordinal
    kinds = [f.kind for f in view.store.findings if f.detector == "outside_writes"]
    is_habitual = sum(kind.startswith("optimizer_state") for kind in kinds) > MAX_HABITUAL_WRITES
    if not view.store.episodes:
        return "no episode, habitual" if is_habitual else "no episode"
    if 0 <= lag <= SHOWS_WITHIN:
        return "just before"
    if is_habitual:
        return "habitual"
    return "near" if -GUARD <= lag <= REACH else "distant"


@observer(
    "optimizer state", "state or gradient", "state or gradient, written", "something else", signal="lab/outside_change"
)
def changed(view: EpisodeView) -> Observation | None:
    """What the experiment found changed."""
    change = view.experiments.outside_change
    if change is None or change.kind is None:
        return None
    level = "something else"
    if change.kind == "optimizer":
        level = "optimizer state"
    elif change.kind in STATE:
        level = "state or gradient" if view.once(_write) is None else "state or gradient, written"
    return Observation(sentences.outside_change(change), level=level, observed=change.repaired)


@observer("later updates only", signal="lab/attribution")
def examined_updates(view: EpisodeView) -> Observation | None:
    """An attribution of later updates refutes no write before them: by then new gradients have replaced the state."""
    found, attribution = view.once(_write), view.experiments.attribution
    if found is None or attribution is None or not view.shares:
        return None
    lag = attribution.ordinal - found.at.ordinal
    if lag <= SHOWS_WITHIN or view.shares.get(Group.OPTIMIZER, 0.0) > judgement.REFUTING_SHARE:
        return None
    return Observation(f"The experiments begin {batches(lag)} after the write; updates before were not examined.")


@observer("long update", signal="update_norm")
def update_after(view: EpisodeView) -> Observation | None:
    """An update after the write that was longer than usual, before the loss rose."""
    found = view.once(_write)
    if found is None or not 0 <= view.onset - found.at.ordinal <= REACH:
        return None
    size = view.worst("update_norm", found.at.ordinal, view.onset)
    if size is None or not size.above:
        return None
    text = f"After it an update was {sentences.times(size.ratio)} as long as usual."
    return Observation(text, observed=size.observed, expected=size.expected)


@observer("weights too", signal="outside_writes/weights")
def weights_written(view: EpisodeView) -> Observation | None:
    """A write into weights and state at once, which loads a checkpoint or starts over."""
    found, weights = view.once(_write), last_write(view, "weights")
    if found is None or weights is None or weights[0].at.ordinal != found.at.ordinal:
        return None
    return Observation("The weights were written to at the same time.", step=found.at.step)


def _write(view: EpisodeView) -> Finding | None:
    written = last_write(view, "optimizer_state")
    return None if written is None else written[0]


def _healthy_step(view: EpisodeView) -> float | None:
    """The step of the newest snapshot of finite values from before the write; `None` without one."""
    found = view.once(_write)
    until = view.onset - 1 if view.store.episodes else -1
    until = until if found is None else found.at.ordinal
    history = view.store.history
    fine = history.ordinals[(history.series(SNAPSHOT) == 1.0) & (history.ordinals <= until)]
    return float(view.step_of(int(fine[-1]))) if fine.size else None


def _summary(view: EpisodeView) -> str:
    found = view.once(_write)
    if found is None:
        text = f"The optimizer's state changed shortly before step {view.step} other than by its own step"
        return f"{text}{view.consequence}."
    count, between = found.number("count"), f"between step {found.at.step} and the next"
    what = "The optimizer's state was"
    if count is not None:
        what = f"{count:.0f} tensor{' of the state was' if count == 1 else 's of the state were'}"
    return f"{what} written to outside the optimizer's step {between}{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    step, found = _healthy_step(view), view.once(_write)
    back = "Go on from the last checkpoint before it, or with an empty optimizer state and a short warm-up."
    if step is not None:
        state = f"the state of step {step:.0f}, the last snapshot before it"
        back = f"Take weights and optimizer back to {state} (AnomalyRollback does so)."
    when = "" if found is None else f" between step {found.at.step} and the next"
    names = "" if found is None else named(found, "")
    where = f"{when} in {names}" if names else when
    find = (
        f"Find what writes into `optimizer.state`{where}: a callback, a hook, code that restores or rescales it. "
        "A loaded state must have the same order of parameters and the same units."
    )
    return Fix(back, Change(setting="optimizer_state", value=step)), Fix(find)


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
    explains=frozenset({
        "warmup_too_short", "numerical_instability", "activation_saturation", "weight_blowup", "stale_second_moment",
        "adam_epsilon_too_small", "momentum_reversal",
    }),
    tested_by=TESTED_BY,
    sufficient_findings=frozenset({
        ("outside_writes", "optimizer_state"), ("outside_writes", "optimizer_state_at_validation"),
    }),
)  # fmt: skip
