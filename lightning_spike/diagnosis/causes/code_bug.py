"""`code_bug`: the training logic does not do what every training step must."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REACH, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.outside import OutsideChange, earlier, last_write, outside_change
from lightning_spike.diagnosis.observations.tells import batches, split_verdict, tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

AT_ONCE: Final = 2
"""Batches from a write into the weights to the first loss that shows it: one, and one more where it was small."""
LEFTOVER: Final = "grad_norm/leftover"
WHOLE: Final = 0.25
"""Share of the elements of the tensors concerned from which they were written over as wholes; a fault of the memory hits single ones."""
CHECKS: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is there where the checks of the training step were."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Bug:
    """One way in which a training step can be wrong, as it was found."""

    found: Finding
    evidence: Evidence
    place: str
    """What `Change.value` says."""
    what: str
    """The first half of the summary."""
    fixes: tuple[str, ...]


class CodeBug(Cause):
    """The training logic does not do what every training step must.

    Seen by: checks that hold in every sound step and were broken: gradients still there when the next backward pass begins, a module in eval mode while training, parameters that left
    the optimizer or never were in one, updates that change nothing, weights written to outside of the optimizer's step (torch's version counters saw it). Where
    nobody was seen writing, the replay: the weights of whole tensors are others than training makes them.

    Against it: none of these was found, though they were looked for; a write long before the loss rose; single elements that are others (that is the machine).

    Thresholds: the checks are exact. A parameter that never was in an optimizer or never had a gradient may be meant so and weighs little; so does a write
    around a validation, where averaged weights are swapped in and out.

    To do: the line to look at is named with the finding: `optimizer_zero_grad`, a `.eval()` without `.train()`, `configure_optimizers`, whoever writes into the weights.
    """

    id: ClassVar = "code_bug"
    family: ClassVar = Family.ENVIRONMENT
    title: ClassVar = "A bug in the training logic"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL, EpisodeKind.OVERFIT}
    explains: ClassVar = frozenset(
        {
            "gradient_explosion",
            "gradient_vanishing",
            "lr_too_high",
            "warmup_too_short",
            "numerical_instability",
            "activation_saturation",
            "weight_blowup",
            "bad_initialization",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
            "post_overfit_oscillation",
        }
    )
    standing: ClassVar = frozenset(
        {
            ("optimizer", "not_zeroed"),
            ("optimizer", "not_optimized"),
            ("optimizer", "no_gradient"),
            ("optimizer", "no_update"),
            ("modes", "eval_mode"),
            ("outside_writes", "weights"),
        }
    )

    @override
    def examine(self, case: Case) -> Examination:
        bugs = sorted(_bugs(case), key=lambda bug: -bug.evidence.weight)
        change = outside_change(case)
        written = _replayed(change, case) if not bugs or bugs[0].place == "weights" else None
        against = None if bugs or written is not None else _nothing_found(case)
        split = split_verdict(case, {"data": -STRONG, "noise": -SLIGHT})
        evidence = (*(bug.evidence for bug in bugs), *without_none(written, against, split))
        if not bugs:
            return Examination(evidence=evidence, summary=_unseen(case), fixes=(_WRITES,), change=_change("weights"))
        worst = bugs[0]
        return Examination(
            evidence=evidence,
            summary=f"{worst.what}; {case.loss_text}." if case.store.episodes else f"{worst.what}.",
            fixes=tuple(fix for bug in bugs for fix in bug.fixes),
            change=_change(worst.place),
            confirmed=True if written is not None and written.weight > 0.0 else None,
        )


def _change(place: str) -> Change:
    return Change(setting="code", value=place)


def _bugs(case: Case) -> list[_Bug]:
    tests: tuple[Callable[[Case], _Bug | None], ...] = (
        _not_zeroed,
        _eval_mode,
        _not_optimized,
        _no_gradient,
        _no_update,
        _weights_written,
    )
    return [bug for test in tests if (bug := test(case)) is not None]


def _bug(found: Finding, weight: float, place: str, what: str, *fixes: str, value: float | None = None) -> _Bug:
    text = found.detail.get("text")
    words = text if isinstance(text, str) else what
    expected = None if value is None else 0.0
    signal = f"{found.detector}/{found.kind}"
    evidence = tell(
        signal, f"At step {found.at.step}: {words}", weight, step=found.at.step, observed=value, expected=expected
    )
    return _Bug(found=found, evidence=evidence, place=place, what=what, fixes=fixes)


# -- the checks ----------------------------------------------------------------------------------------------------------


def _not_zeroed(case: Case) -> _Bug | None:
    if earlier(case, "optimizer", "not_zeroed") is None:
        return None
    found = case.findings("optimizer", "not_zeroed", first=0, last=case.last)[0]
    held = case.latest(LEFTOVER, max(case.onset, found.at.ordinal))
    lasts = held is None or held[0] >= case.onset - REACH
    norm = held[1] if held is not None and math.isfinite(held[1]) else None
    return _bug(
        found,
        DECISIVE + FAIR if lasts else STRONG,
        "zero_grad",
        f"Since step {found.at.step} gradients are not zeroed, so that updates are made with the sum over the batches",
        "Look at `optimizer_zero_grad` of the module (an override must call `optimizer.zero_grad()` every time) and at what keeps gradients in a buffer and writes them back"
        f" to `.grad`; it went wrong at step {found.at.step}.",
        value=norm,
    )


def _eval_mode(case: Case) -> _Bug | None:
    found = earlier(case, "modes", "eval_mode")
    if found is None:
        return None
    matters = found.detail.get("matters")
    names = [str(name) for name in matters] if isinstance(matters, list | tuple) else []
    weight = (
        DECISIVE + FAIR if names and _is_near(case, found) else DECISIVE if names or not case.store.episodes else FAIR
    )
    which = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""  # noqa: PLR2004 - three are named
    return _bug(
        found,
        weight,
        "train_mode",
        f"From step {found.at.step} on modules are in eval mode while training{which}",
        f"Look for a `.eval()` without a `.train()` after it, called between step {found.at.step - 1} and step {found.at.step}: a validation, sampling or a metric in user code. Call "
        "`module.train()` after it, or use `torch.no_grad()` alone.",
    )


def _not_optimized(case: Case) -> _Bug | None:
    found = earlier(case, "optimizer", "not_optimized")
    if found is None:
        return None
    from_start = found.detail.get("from_start") is True
    some = _named(found)
    return _bug(
        found,
        _meant(case) if from_start else DECISIVE + FAIR if _is_near(case, found) else DECISIVE,
        "parameters",
        f"Parameters that get gradients {'were never in an optimizer' if from_start else f'left the optimizer at step {found.at.step}'} and are not trained",
        f"Look at `configure_optimizers`: {some} must be in a parameter group; a layer that is made later needs `optimizer.add_param_group`, a filter on names must let them through. If it is meant, set "
        "`requires_grad_(False)`.",
    )


def _no_gradient(case: Case) -> _Bug | None:
    found = earlier(case, "optimizer", "no_gradient")
    if found is None:
        return None
    from_start = found.detail.get("from_start") is True
    return _bug(
        found,
        _meant(case) if from_start else STRONG,
        "parameters",
        f"Parameters of the optimizer get no gradient{'' if from_start else ' any more'}",
        f"Look at how {_named(found)} reach the loss: a `.detach()`, `torch.no_grad()`, a `.data` or `.item()` on the way, or a layer that `forward` does not call.",
    )


def _no_update(case: Case) -> _Bug | None:
    """Steps that a loss scaler skips change nothing either, and low-precision weights lose small updates in rounding: both are another cause's."""
    found = earlier(case, "optimizer", "no_update")
    if found is None:
        return None
    full = case.facts.precision.startswith(("32", "64", "bf16-mixed"))
    return _bug(
        found,
        STRONG if full else SLIGHT,
        "parameters",
        f"From step {found.at.step} on updates change nothing",
        "Look at which tensors the optimizer holds (`trainer.optimizers[0].param_groups`): after a replaced module or a re-created parameter they are others than the model's; make the optimizer after "
        "that.",
    )


def _weights_written(case: Case) -> _Bug | None:
    written = last_write(case, "weights")
    if written is None:
        return None
    found, validated = written
    lag = case.onset - found.at.ordinal
    quiet = not case.store.episodes
    weight = DECISIVE if quiet else DECISIVE + FAIR if lag <= AT_ONCE else STRONG if lag <= REACH else SLIGHT
    if validated:
        weight = FAIR if not quiet and lag <= AT_ONCE else 0.0
    if case.findings("outside_writes", "optimizer_state", first=found.at.ordinal, last=found.at.ordinal):
        weight = min(
            weight, SLIGHT
        )  # weights and state at once is a step of the optimizer, one more or one less than usual
    return _bug(
        found,
        weight,
        "weights",
        f"The weights were written to outside of the optimizer's step, after step {found.at.step}"
        + ("" if quiet else f", {_before(lag)}"),
        f"{_WRITES} It was between step {found.at.step} and the step after, in {_named(found)}.",
    )


_WRITES: Final = (
    "Look for code that writes into the weights between two training steps: a callback, a hook, an averaging or re-initialisation (`copy_`, `add_`, `load_state_dict`, "
    "`.data`). If it must be, write into a copy."
)


def _before(lag: int) -> str:
    return "as the loss rose" if lag <= 0 else f"{batches(lag)} before the loss rose"


def _meant(case: Case) -> float:
    """Fine-tuning leaves parameters out on purpose: by itself that shows nothing."""
    return SLIGHT if case.store.episodes else 0.0


def _is_near(case: Case, found: Finding) -> bool:
    return 0 <= case.onset - found.at.ordinal <= REACH


def _named(found: Finding) -> str:
    names = found.detail.get("names")
    told = [str(name) for name in names[:3]] if isinstance(names, list | tuple) else []
    more = len(names) > len(told) if isinstance(names, list | tuple) else False
    return ", ".join(f"`{name}`" for name in told) + (", …" if more else "") if told else "the parameters"


# -- the replay ----------------------------------------------------------------------------------------------------------


def _replayed(change: OutsideChange | None, case: Case) -> Evidence | None:
    """Whole tensors that are others are somebody's code, whoever wrote; single elements, or a result alone, are not."""
    if change is None or change.changed not in {"weights", None}:
        return None
    share = change.share
    if "weights" in change.seen:
        return tell("lab/outside", change.text, REPLAYED, step=case.step, observed=change.repaired)
    if change.changed is None or share is None:
        return None
    weight = FAIR if share >= WHOLE else -STRONG
    counted = (
        f"{change.elements} of {change.of} elements of the tensors concerned are others, and nobody was seen writing."
    )
    return tell("lab/outside", f"{change.text} {counted}", weight, step=case.step, observed=share)


def _nothing_found(case: Case) -> Evidence:
    looked = any(signal in case.store.history.signals for signal in CHECKS)
    if looked:
        text = "Every training step was looked at, and none was without its updates, kept its gradients, ran in eval mode or had its weights written to."
        return tell("optimizer", text, -STRONG, step=case.step)
    text = "Nothing was seen that a sound training step does not do."
    return tell("optimizer", text, -FAIR, step=case.step)


def _unseen(case: Case) -> str:
    return f"Something wrote into the weights between two updates without being seen, and {case.loss_text}."
