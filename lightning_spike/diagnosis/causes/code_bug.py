"""`code_bug`: the training logic does not do what every training step must.

Seen by: checks that hold in every sound step and were broken: gradients still there when the next backward pass begins,
a module in eval mode while training, parameters that left the optimizer or never were in one, updates that change
nothing, weights written to outside of the optimizer's step (torch's version counters saw it). Where no write was seen,
the replay: whole weight tensors differ from those that training makes.

Against it: none of these was found, though they were looked for; a write long before the loss rose; single elements
that differ (that is the machine).

Thresholds: the checks are exact. A parameter that never was in an optimizer or never had a gradient may be meant so and
weighs little; so does a write around a validation, where averaged weights are
swapped in and out.

To do: the line to look at is named with the finding: `optimizer_zero_grad`, a `.eval()` without `.train()`,
`configure_optimizers`, the code that writes into the weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.constants import REACH
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import changed_weights, earlier, last_write, outside_change
from lightning_spike.diagnosis.observations.shared_evidence import batches, finite
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

AT_ONCE: Final = 2
"""Batches from a write into the weights to the first loss that shows it: one, and one more where it was small;
engineering choice."""
WHOLE_TENSOR_SHARE: Final = 0.25
"""Share of the elements of the tensors concerned from which whole tensors were written; a fault of the memory hits
single ones; engineering choice."""
NAMED: Final = 3
"""Names listed; engineering choice."""
CHECKS: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is there where the training step was checked."""
LEFTOVER: Final = "grad_norm/leftover"
CERTAINTY: Final = {
    "lasting": 4, "near": 4, "just before": 4, "known modules": 3, "left": 3, "no episode": 3, "past": 2, "lost": 2,
    "before": 2, "full precision": 2, "other modules": 1,
}  # fmt: skip
"""How sure a level is, to choose the bug that is told first; 0 for one that is not listed."""
FIND_WRITES: Final = (
    "Look for code that writes into the weights between two training steps: a callback, a hook, an averaging or "
    "re-initialisation (`copy_`, `add_`, `load_state_dict`, `.data`). If it must be, write into a copy."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """One way in which a training step is wrong, as it was found."""

    found: Finding
    level: str
    place: str
    """What `Change.value` says."""
    what: str
    """The first half of the summary."""
    fix: str
    value: float | None = None


def _not_zeroed(view: EpisodeView) -> Bug | None:
    if earlier(view, "optimizer", "not_zeroed") is None:
        return None
    found = view.findings("optimizer", "not_zeroed", first=0, last=view.last)[0]
    held = view.latest(LEFTOVER, max(view.onset, found.at.ordinal))
    return Bug(
        found=found,
        level="lasting" if held is None or held[0] >= view.onset - REACH else "past",
        place="zero_grad",
        what=f"Since step {found.at.step} gradients are not zeroed, so that updates are made with the sum over the batches",
        fix="Look at `optimizer_zero_grad` of the module (an override must call `optimizer.zero_grad()` every time) and at "
        f"what keeps gradients in a buffer and writes them back to `.grad`; it went wrong at step {found.at.step}.",
        value=None if held is None else finite(held[1]),
    )


def _eval_mode(view: EpisodeView) -> Bug | None:
    found = earlier(view, "modes", "eval_mode")
    if found is None:
        return None
    names, step = found.names("matters"), found.at.step
    level = "known modules" if names or not view.store.episodes else "other modules"
    which = f" ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})" if names else ""
    return Bug(
        found=found,
        level="near" if names and _is_near(view, found) else level,
        place="train_mode",
        what=f"From step {step} on modules are in eval mode while training{which}",
        fix=f"Look for a `.eval()` without a `.train()` after it, called between step {step - 1} and step {step}: "
        "a validation, sampling or a metric in user code. Call `module.train()` after it, or use `torch.no_grad()` alone.",
    )


def _not_optimized(view: EpisodeView) -> Bug | None:
    found = earlier(view, "optimizer", "not_optimized")
    if found is None:
        return None
    from_start = found.detail.get("from_start") is True
    what = "were never in an optimizer" if from_start else f"left the optimizer at step {found.at.step}"
    return Bug(
        found=found,
        level=_from_start(view) if from_start else _left_level(view, found),
        place="parameters",
        what=f"Parameters that get gradients {what} and are not trained",
        fix=f"Look at `configure_optimizers`: {_named(found)} must be in a parameter group; a later layer needs "
        "`optimizer.add_param_group`, a filter on names must let them through. If it is meant, set `requires_grad_(False)`.",
    )


def _left_level(view: EpisodeView, found: Finding) -> str:
    return "near" if _is_near(view, found) else "left"


def _no_gradient(view: EpisodeView) -> Bug | None:
    found = earlier(view, "optimizer", "no_gradient")
    if found is None:
        return None
    from_start = found.detail.get("from_start") is True
    return Bug(
        found=found,
        level=_from_start(view) if from_start else "lost",
        place="parameters",
        what=f"Parameters of the optimizer get no gradient{'' if from_start else ' any more'}",
        fix=f"Look at how {_named(found)} reach the loss: a `.detach()`, `torch.no_grad()`, a `.data` or `.item()` in between, "
        "or a layer that `forward` does not call.",
    )


def _no_update(view: EpisodeView) -> Bug | None:
    """Steps that a loss scaler skips change nothing either, and low-precision weights lose small updates in rounding.

    Both have another cause.
    """
    found = earlier(view, "optimizer", "no_update")
    if found is None:
        return None
    full = view.facts.precision.startswith(("32", "64", "bf16-mixed"))
    return Bug(
        found=found,
        level="full precision" if full else "low precision",
        place="parameters",
        what=f"From step {found.at.step} on updates change nothing",
        fix="Look at which tensors the optimizer holds (`trainer.optimizers[0].param_groups`): after a replaced module or a "
        "re-created parameter they are not the model's; make the optimizer after that.",
    )


def _weights_written(view: EpisodeView) -> Bug | None:
    written = last_write(view, "weights")
    if written is None:
        return None
    found, lag = written[0], view.onset - written[0].at.ordinal
    when = ""
    if view.store.episodes:
        when = ", as the loss rose" if lag <= 0 else f", {batches(lag)} before the loss rose"
    return Bug(
        found=found,
        level=_write_level(view, found, validated=written[1]),
        place="weights",
        what=f"The weights were written to outside of the optimizer's step, after step {found.at.step}{when}",
        fix=f"{FIND_WRITES} It was between step {found.at.step} and the step after, in {_named(found)}.",
    )


def _write_level(view: EpisodeView, found: Finding, *, validated: bool) -> str:
    """Weights and state at once is a step of the optimizer, one more or one less than usual."""
    lag, at = view.onset - found.at.ordinal, found.at.ordinal
    if validated:
        return "at a validation, just before" if view.store.episodes and lag <= AT_ONCE else "at a validation"
    if view.findings("outside_writes", "optimizer_state", first=at, last=at):
        return "with the state"
    if not view.store.episodes:
        return "no episode"
    if lag <= AT_ONCE:
        return "just before"
    return "before" if lag <= REACH else "long before"


def _from_start(view: EpisodeView) -> str:
    """Fine-tuning leaves parameters out on purpose: alone that shows nothing."""
    return "from the start" if view.store.episodes else "from the start, no episode"


def _is_near(view: EpisodeView, found: Finding) -> bool:
    return 0 <= view.onset - found.at.ordinal <= REACH


def _named(found: Finding) -> str:
    names = found.names()
    if not names:
        return "the parameters"
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + (", …" if len(names) > NAMED else "")


Check = Callable[[EpisodeView], Bug | None]
FROM_START: Final = ("from the start", "from the start, no episode")
WRITES: Final = (
    "no episode", "just before", "before", "long before", "with the state", "at a validation",
    "at a validation, just before",
)  # fmt: skip


def _check(name: str, check: Check, *levels: str) -> Observer:
    """An observer of one bug."""

    def observe(view: EpisodeView) -> Observation | None:
        bug = check(view)
        if bug is None:
            return None
        found = bug.found
        return Observation(
            level=bug.level, text=f"At step {found.at.step}: {found.text or bug.what}",
            signal=f"{found.detector}/{found.kind}", step=found.at.step, observed=bug.value,
            expected=None if bug.value is None else 0.0,
        )  # fmt: skip

    return Observer(name, levels, observe)


CHECKED: Final = (_not_zeroed, _eval_mode, _not_optimized, _no_gradient, _no_update, _weights_written)


def _bugs(view: EpisodeView) -> tuple[Bug, ...]:
    """The bugs that were found, the surest first."""
    found = [bug for check in CHECKED if (bug := check(view)) is not None]
    return tuple(sorted(found, key=lambda bug: -CERTAINTY.get(bug.level, 0)))


@observer("seen writing", "whole tensors", "single elements")
def replayed_weights(view: EpisodeView) -> Observation | None:
    """Whole tensors that differ are the work of code; single elements, or a result alone, are not."""
    bugs, change = view.once(_bugs), outside_change(view)
    if change is None or change.kind not in {"weights", None} or (bugs and bugs[0].place != "weights"):
        return None
    elements, of, _ = changed_weights(change)
    if any(write.kind == "weights" for write in change.writes):
        level = "seen writing"
    elif change.kind is None or not of:
        return None
    else:
        level = "whole tensors" if elements >= WHOLE_TENSOR_SHARE * of else "single elements"
    return Observation(
        level=level, text=sentences.outside_change(change), signal="lab/outside_change", step=view.step,
        observed=change.repaired, confirms=True if level != "single elements" and bugs else None,
    )  # fmt: skip


@observer("checked", "unknown")
def no_bug_found(view: EpisodeView) -> Observation | None:
    """None of the checks was broken."""
    if view.once(_bugs) or replayed_weights(view) is not None:
        return None
    checked = any(signal in view.store.history.signals for signal in CHECKS)
    text = "No training-loop fault was detected."
    return Observation(level="checked" if checked else "unknown", text=text, signal="optimizer", step=view.step)


def _summary(view: EpisodeView) -> str:
    bugs = view.once(_bugs)
    if not bugs:
        return f"Something wrote into the weights between two updates without being seen, and {view.loss_text}."
    return f"{bugs[0].what}; {view.loss_text}." if view.store.episodes else f"{bugs[0].what}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    bugs = view.once(_bugs)
    if not bugs:
        return (Fix(FIND_WRITES, Change(setting="code", value="weights")),)
    return tuple(Fix(bug.fix, Change(setting="code", value=bug.place)) for bug in bugs)


CAUSE: Final = Cause(
    id="code_bug",
    family=Family.ENVIRONMENT,
    title="A bug in the training logic",
    meaning="gradients not zeroed, eval mode left on, parameters not optimized, weights overwritten",
    observations=(
        _check("not_zeroed", _not_zeroed, "lasting", "past"),
        _check("eval_mode", _eval_mode, "near", "known modules", "other modules"),
        _check("not_optimized", _not_optimized, "near", "left", *FROM_START),
        _check("no_gradient", _no_gradient, "lost", *FROM_START),
        _check("no_update", _no_update, "full precision", "low precision"),
        _check("weights_written", _weights_written, *WRITES),
        replayed_weights,
        no_bug_found,
        split_of_jump(frozenset({Group.OUTSIDE})),
    ),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL, EpisodeKind.OVERFIT},
    explains=frozenset(
        {
            "gradient_vanishing",
            "warmup_too_short",
            "activation_saturation",
            "weight_blowup",
            "bad_initialization",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
            "post_overfit_oscillation",
        }
    ),
    sufficient_findings=frozenset(
        {
            ("optimizer", "not_zeroed"),
            ("optimizer", "not_optimized"),
            ("optimizer", "no_gradient"),
            ("optimizer", "no_update"),
            ("modes", "eval_mode"),
            ("outside_writes", "weights"),
        }
    ),
)
