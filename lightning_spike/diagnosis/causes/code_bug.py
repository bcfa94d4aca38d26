"""`code_bug`: the training logic does not do what every training step must.

Seen by: checks that hold in every sound step and failed: gradients still there when the next backward pass begins, a
module in eval mode during training, parameters that left the optimizer or never were in one, updates that change
nothing, weights written to outside the optimizer's step (by torch's version counters). Where no write was seen, the
replay: whole weight tensors differ from those that training makes.

Against it: none of these was found although they were checked; a write long before the loss rose; single elements that
differ (a hardware fault).

Thresholds: the checks are exact. A parameter that never was in an optimizer or never had a gradient may be intended and
weighs little; so does a write around a validation, where averaged weights are swapped in and out.

To do: the finding names the line to look at: `optimizer_zero_grad`, a `.eval()` without `.train()`,
`configure_optimizers`, the code that writes into the weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.batch_ranges import REACH
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.outside import (
    MAX_NAMES,
    SHOWS_WITHIN,
    WHOLE_TENSOR_SHARE,
    changed_weights,
    earlier,
    is_watched,
    last_write,
    named,
)
from lightning_spike.diagnosis.observations.shared_evidence import before_rise, finite
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

LEFTOVER: Final = "grad_norm/leftover"
CERTAINTY: Final = {
    "lasting": 4, "near": 4, "just before": 4, "known modules": 3, "left": 3, "no episode": 3, "past": 2, "lost": 2,
    "before": 2, "full precision": 2, "other modules": 1,
}  # fmt: skip
"""How certain a level is, to sort the bugs; 0 for others."""
FIND_WRITES: Final = (
    "Look for code that writes into the weights between two training steps: a callback, a hook, an averaging or "
    "re-initialisation (`copy_`, `add_`, `load_state_dict`, `.data`). If it must be, write into a copy."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Bug:
    """One fault of the training step."""

    found: Finding
    level: str
    place: str
    """The value of `Change`."""
    what: str
    """The first half of the summary."""
    fix: str
    value: float | None = None


def _not_zeroed(view: EpisodeView) -> Bug | None:
    if earlier(view, "optimizer", "not_zeroed") is None:
        return None
    found = view.findings("optimizer", "not_zeroed", first=0, last=view.last)[0]
    held, step = view.latest(LEFTOVER, max(view.onset, found.at.ordinal)), found.at.step
    level = "lasting" if held is None or held[0] >= view.onset - REACH else "past"
    what = f"Since step {step} gradients are not zeroed, so that updates are made with the sum over the batches"
    fix = (
        "Look at `optimizer_zero_grad` of the module (an override must call `optimizer.zero_grad()` every time) and at "
        f"what keeps gradients in a buffer and writes them back to `.grad`; it went wrong at step {step}."
    )
    return Bug(found, level, "zero_grad", what, fix, value=None if held is None else finite(held[1]))


def _eval_mode(view: EpisodeView) -> Bug | None:
    found = earlier(view, "modes", "eval_mode")
    if found is None:
        return None
    names, step = found.names("matters"), found.at.step
    level = "known modules" if names or not view.store.episodes else "other modules"
    level = "near" if names and _is_near(view, found) else level
    more = ", …" if len(names) > MAX_NAMES else ""
    which = f" ({', '.join(names[:MAX_NAMES])}{more})" if names else ""
    fix = (
        f"Look for a `.eval()` without a `.train()` after it, called between step {step - 1} and step {step}: in a "
        "validation, sampling or metric of yours. Call `module.train()` after it, or use only `torch.no_grad()`."
    )
    what = f"From step {step} on modules are in eval mode during training{which}"
    return Bug(found, level, "train_mode", what, fix)


def _not_optimized(view: EpisodeView) -> Bug | None:
    found = earlier(view, "optimizer", "not_optimized")
    if found is None:
        return None
    level = "near" if _is_near(view, found) else "left"
    state = f"left the optimizer at step {found.at.step}"
    if _is_from_start(found):
        level, state = _from_start_level(view), "were never in an optimizer"
    fix = (
        f"Look at `configure_optimizers`: {_named(found)} must be in a parameter group; add later layers with "
        "`optimizer.add_param_group`, and check filters on names. If this is intended, set `requires_grad_(False)`."
    )
    return Bug(found, level, "parameters", f"Parameters that get gradients {state} and are not trained", fix)


def _no_gradient(view: EpisodeView) -> Bug | None:
    found = earlier(view, "optimizer", "no_gradient")
    if found is None:
        return None
    level, since = (_from_start_level(view), "") if _is_from_start(found) else ("lost", " any more")
    fix = (
        f"Look at how {_named(found)} reach the loss: a `.detach()`, `torch.no_grad()`, a `.data` or `.item()` in "
        "between, or a layer that `forward` does not call."
    )
    return Bug(found, level, "parameters", f"Parameters of the optimizer get no gradient{since}", fix)


def _no_update(view: EpisodeView) -> Bug | None:
    """Updates that change nothing; loss scaling skips steps too, and low precision rounds small updates to nothing."""
    found = earlier(view, "optimizer", "no_update")
    if found is None:
        return None
    level = "full precision" if view.facts.precision.startswith(("32", "64", "bf16-mixed")) else "low precision"
    fix = (
        "Look at which tensors the optimizer holds (`trainer.optimizers[0].param_groups`): after a module is replaced "
        "or a parameter re-created they are not the model's; create the optimizer after that."
    )
    return Bug(found, level, "parameters", f"From step {found.at.step} on updates change nothing", fix)


def _weights_written(view: EpisodeView) -> Bug | None:
    written = last_write(view, "weights")
    if written is None:
        return None
    found, step = written[0], written[0].at.step
    when = before_rise(view.onset - found.at.ordinal) if view.store.episodes else ""
    what = f"The weights were written to outside the optimizer's step, after step {step}{when}"
    fix = f"{FIND_WRITES} It was between step {step} and the step after, in {_named(found)}."
    return Bug(found, _write_level(view, found, validated=written[1]), "weights", what, fix)


def _write_level(view: EpisodeView, found: Finding, *, validated: bool) -> str:
    """The level of a write; one into weights and state at once is an optimizer step more or less than usual."""
    lag, at = view.onset - found.at.ordinal, found.at.ordinal
    if validated:
        return "at a validation, just before" if view.store.episodes and lag <= SHOWS_WITHIN else "at a validation"
    if view.findings("outside_writes", "optimizer_state", first=at, last=at):
        return "with the state"
    if not view.store.episodes:
        return "no episode"
    if lag <= SHOWS_WITHIN:
        return "just before"
    return "before" if lag <= REACH else "long before"


def _is_from_start(found: Finding) -> bool:
    return found.detail.get("from_start") is True


def _from_start_level(view: EpisodeView) -> str:
    """The level of parameters left out from the start, which is intended in fine-tuning."""
    return "from the start" if view.store.episodes else "from the start, no episode"


def _is_near(view: EpisodeView, found: Finding) -> bool:
    return 0 <= view.onset - found.at.ordinal <= REACH


def _named(found: Finding) -> str:
    return named(found, "the parameters")


Check = Callable[[EpisodeView], Bug | None]
FROM_START: Final = ("from the start", "from the start, no episode")
WRITES: Final = (
    "no episode", "just before", "before", "long before", "with the state", "at a validation",
    "at a validation, just before",
)  # fmt: skip


def _check(name: str, check: Check, *levels: str) -> Observer:
    """Observe one kind of bug."""

    def observe(view: EpisodeView) -> Observation | None:
        bug = check(view)
        if bug is None:
            return None
        found, zero = bug.found, None if bug.value is None else 0.0
        text, signal = f"At step {found.at.step}: {found.text or bug.what}", f"{found.detector}/{found.kind}"
        return Observation(text, level=bug.level, signal=signal, step=found.at.step, observed=bug.value, expected=zero)

    return Observer(name, levels, observe)


CHECKED: Final = (_not_zeroed, _eval_mode, _not_optimized, _no_gradient, _no_update, _weights_written)


def _bugs(view: EpisodeView) -> tuple[Bug, ...]:
    """The bugs that were found, the most certain first."""
    found = [bug for check in CHECKED if (bug := check(view)) is not None]
    return tuple(sorted(found, key=lambda bug: -CERTAINTY.get(bug.level, 0)))


@observer("seen writing", "whole tensors", "single elements", signal="lab/outside_change")
def replayed_weights(view: EpisodeView) -> Observation | None:
    """Code changes whole tensors; single elements, or a result alone, are a hardware fault."""
    bugs, change = view.once(_bugs), view.experiments.outside_change
    if change is None or change.kind not in {"weights", None} or (bugs and bugs[0].place != "weights"):
        return None
    elements, of, _ = changed_weights(change)
    if any(write.kind == "weights" for write in change.writes):
        level = "seen writing"
    elif change.kind is None or not of:
        return None
    else:
        level = "whole tensors" if elements >= WHOLE_TENSOR_SHARE * of else "single elements"
    confirms = True if level != "single elements" and bugs else None
    return Observation(sentences.outside_change(change), level=level, observed=change.repaired, confirms=confirms)


@observer("checked", "unknown", signal="optimizer")
def no_bug_found(view: EpisodeView) -> Observation | None:
    """All checks held."""
    if view.once(_bugs) or replayed_weights(view) is not None:
        return None
    return Observation("No training-loop fault was detected.", level="checked" if is_watched(view) else "unknown")


def _summary(view: EpisodeView) -> str:
    bugs = view.once(_bugs)
    what = bugs[0].what if bugs else "Something wrote into the weights between two updates without being seen"
    return f"{what}{view.consequence}."


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
    explains=frozenset({
        "gradient_reversal", "gradient_vanishing", "warmup_too_short", "activation_saturation", "weight_blowup",
        "bad_initialization", "stale_second_moment", "adam_epsilon_too_small", "momentum_reversal",
        "post_overfit_oscillation",
    }),
    sufficient_findings=frozenset({
        ("optimizer", "not_zeroed"), ("optimizer", "not_optimized"), ("optimizer", "no_gradient"),
        ("optimizer", "no_update"), ("modes", "eval_mode"), ("outside_writes", "weights"),
    }),
)  # fmt: skip
