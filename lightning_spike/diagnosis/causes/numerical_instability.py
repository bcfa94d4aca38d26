"""`numerical_instability`: a non-finite or huge value is born inside the model or the loss."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, NEAR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.measured import blown_up, wild_scatter
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    gradient_in_range,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, EpisodeKind, Evidence, Family

HUGE: Final = 1e4
"""Factor over the loss before from which a finite loss in an ordinary batch may be the work of an operation (x / ~0, exp), not of training."""
BIRTHPLACE: Final = frozenset({"forward", "loss", "backward"})
REMEDIES: Final[Mapping[str, str]] = {
    "log": "replace torch.log(x) by torch.log(x.clamp_min({eps:g})), or use log_softmax / logsigmoid",
    "div": "replace a / b by a / b.clamp_min({eps:g})",
    "reciprocal": "replace 1 / x by 1 / x.clamp_min({eps:g})",
    "sqrt": "replace torch.sqrt(x) by torch.sqrt(x + {eps:g}): its gradient at 0 is infinite",
    "norm": "replace x.norm() by (x.square().sum() + {eps:g}).sqrt(): its gradient at 0 is NaN",
    "exp": "subtract the maximum before torch.exp, or clamp its argument to at most {top:g}",
    "pow": "keep the base of the power above {eps:g}",
    "acos": "clamp the argument to within ±(1 - {eps:g})",
}
"""What to write in place of an operation, by a part of its name."""
EPS: Final = {"16": 1e-4, "bf16": 1e-6}
"""Smallest safe epsilon by precision; 1e-7 in float32, 2e-4 of whose square root float32 still resolves."""
EXP_LIMIT: Final = {"16": 11.0, "bf16": 88.0}
"""Argument at which exp overflows: 11.09 in float16, 88.72 in float32 and bfloat16 (science.md 2.2)."""


class NumericalInstability(Cause):
    """A non-finite or huge value is born inside the model or the loss: log(0), exp overflow, x / 0, sqrt at 0.

    Seen by: a loss that was in its range and is not finite in the next batch, though the batch itself is finite; a gradient that is not finite while the loss
    still is (born in the backward pass); the lab's re-run of that batch, which names the module and the operation.

    Against it: NaN or Inf in the batch; a loss or gradient that grew over several batches first (then weights ran away, and overflow is the end of it);
    an event of the learning rate, which takes this evidence away.

    Thresholds: none but finiteness; a finite loss counts from 10,000 times its level in an ordinary batch, or where ordinary batches run again with the weights of before differ by as much.

    To do: the safe form of the operation with an epsilon that suits the precision; back to a checkpoint from before.
    """

    id: ClassVar = "numerical_instability"
    family: ClassVar = Family.NUMERICS
    title: ClassVar = "A value that is not finite is born in the model or the loss"
    explains: ClassVar = frozenset({"gradient_explosion"})

    @override
    def examine(self, case: Case) -> Examination:
        born = _blown_up(case) or _birth(case) or _wild(case)
        if born is None:
            return Examination(
                evidence=(
                    tell(
                        case.episode.signal,
                        "Loss and gradient stayed finite and of the usual order.",
                        -STRONG,
                        step=case.step,
                    ),
                )
            )
        told = case.lab("nonfinite_origin")
        evidence = without_none(
            born,
            _origin(case, told),
            *(() if _is_finite(case) else (_input(case), _grew(case))),
            gradient_in_range(case, SLIGHT),
            batch_value(case, ordinary=SLIGHT, odd=-SLIGHT),
            _precision(case),
            split_verdict(case, {"weights": -FAIR, "noise": 0.0 if _wild(case) is not None else -FAIR})
            if _is_finite(case)
            else None,
        )
        return Examination(
            evidence=evidence,
            summary=_summary(case, told),
            fixes=_fixes(case, told),
            change=Change(setting="operation", value=_place(case, told)),
            confirmed=_confirmed(told),
        )


def _confirmed(told: Mapping[str, Any] | None) -> bool | None:
    """By the replay: an operation that fails under healthy weights too. Where only the weights of the onset make it fail, it may just be where they ended."""
    phase = told.get("phase") if told is not None else None
    if told is None or not isinstance(phase, str):
        return None
    if phase not in BIRTHPLACE:
        return False
    return None if told.get("with_healthy_weights") is False else True


def _birth(case: Case) -> Evidence | None:
    """The moment at which a non-finite or huge value appeared."""
    for ordinal in range(max(case.onset - GUARD, 0), case.onset + 1):
        norm, loss = case.at("grad_norm", ordinal), case.at(case.episode.signal, ordinal)
        if norm is not None and not math.isfinite(norm) and loss is not None and math.isfinite(loss):
            return tell(
                "grad_norm",
                "The gradient was not finite while the loss still was: born in the backward pass.",
                FAIR,
                step=case.step,
            )
    loss = case.at_onset(case.episode.signal)
    if case.kind is EpisodeKind.NONFINITE or (loss is not None and not math.isfinite(loss)):
        return tell(
            case.episode.signal,
            f"At step {case.step} {case.loss_text}.",
            SLIGHT,
            step=case.step,
            expected=case.episode.loss_before,
        )
    before = case.episode.loss_before
    if loss is None or before is None or not before > 0.0 or loss < HUGE * before:
        return None
    computed = case.split == "computation"
    text = f"The loss was {loss / before:.2g} times as high from one batch to the next{', with the weights of before as well' if computed else ''}."
    return tell(
        case.episode.signal, text, DECISIVE if computed else SLIGHT, step=case.step, observed=loss, expected=before
    )


def _blown_up(case: Case) -> Evidence | None:
    """The same weights and ordinary batches give a far higher loss than before, and the outputs of a module with it."""
    grown = blown_up(case)
    if grown is None:
        return None
    text = f"With the weights and batches of before, the outputs of '{grown[0]}' are now {grown[1]:.3g} times their usual size: an operation there divides by nearly 0, or grows like exp."
    return tell("lab/measured", text, DECISIVE, step=case.step, observed=grown[1], expected=1.0)


def _wild(case: Case) -> Evidence | None:
    """With the weights of before, ordinary batches have losses that are thousands of times apart: some in the range of before or 0, others far above."""
    scatter = wild_scatter(case)
    if scatter is None:
        return None
    before = case.episode.loss_before
    text = f"With the weights of before, ordinary batches that had a loss of about {before:.3g} scatter by {scatter:.3g}: in some of them values blow up, as by a division by nearly 0."
    return tell("lab/split", text, DECISIVE, step=case.step, observed=scatter, expected=before)


def _is_finite(case: Case) -> bool:
    """Only a huge value, none that is not finite: then finite values in the batch say nothing, and that it came out of the blue is what makes it one."""
    values = (
        case.at(name, ordinal)
        for name in ("grad_norm", case.episode.signal)
        for ordinal in range(max(case.onset - GUARD, 0), case.onset + 1)
    )
    return case.kind is not EpisodeKind.NONFINITE and all(v is None or math.isfinite(v) for v in values)


def _origin(case: Case, told: Mapping[str, Any] | None) -> Evidence | None:
    if told is None or not isinstance(told.get("phase"), str):
        return None
    text = told.get("text")
    words = (
        text if isinstance(text, str) and text else f"Replayed, the first non-finite value appears in: {told['phase']}."
    )
    if told["phase"] not in BIRTHPLACE:
        weight = -DECISIVE
    elif told.get("with_healthy_weights") is False:  # what made the weights so comes before it
        weight = SLIGHT
    else:
        weight = DECISIVE
    return tell("lab/nonfinite_origin", words, weight, step=case.step)


def _input(case: Case) -> Evidence | None:
    signals = [f"batch/{leaf}/nonfinite" for leaf in case.leaves("nonfinite")]
    counts = [count for s in signals for at in case.questioned if (count := case.at(s, at)) is not None]
    if not counts:
        return None
    if any(count != 0.0 for count in counts):  # NaN as well
        return tell("batch", f"The batch at step {case.step} holds NaN or Inf already.", -DECISIVE, step=case.step)
    return tell(
        "batch",
        f"All values of the batch at step {case.step} are finite.",
        FAIR,
        step=case.step,
        observed=0.0,
        expected=0.0,
    )


def _grew(case: Case) -> Evidence | None:
    """Whether loss or gradient grew over some batches before the value was born, or it came out of the blue."""
    first = case.at_onset(case.episode.signal)
    last = case.worst("grad_norm", case.onset - NEAR, case.onset - 1)
    grew = first is not None and math.isfinite(first) and case.kind is EpisodeKind.NONFINITE
    if grew or (last is not None and last.above and math.isfinite(last.observed)):
        return tell(
            case.episode.signal, "Loss or gradient had left their range some batches before.", -FAIR, step=case.step
        )
    before = case.at(case.episode.signal, case.onset - 1)
    if before is None or not math.isfinite(before):
        return None
    text = f"The loss of the batch before was {before:.3g}, in its range: it came out of the blue."
    return tell(case.episode.signal, text, FAIR, step=case.step, observed=before, expected=case.episode.loss_before)


def _precision(case: Case) -> Evidence | None:
    if not case.facts.precision.startswith("16"):
        return None
    return tell("precision", "float16 overflows at 65,504, exp already at 11.", SLIGHT, step=case.step)


def _place(case: Case, told: Mapping[str, Any] | None) -> str:
    grown = blown_up(case) if told is None else None
    return f"in {grown[0]}" if grown is not None else _where(told)


def _where(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "inside the model or the loss"
    module, operation = told.get("module"), told.get("operation")
    parts = [
        f"in {module}" if isinstance(module, str) and module else "",
        f"by {operation}" if isinstance(operation, str) and operation else "",
    ]
    return " ".join(filter(None, parts)) or f"in the {told.get('phase')} pass"


def _summary(case: Case, told: Mapping[str, Any] | None) -> str:
    return f"A value that is not finite, or huge, was born {_place(case, told)} at step {case.step}: {case.loss_text}."


def _fixes(case: Case, told: Mapping[str, Any] | None) -> tuple[str, ...]:
    kind = (
        "bf16" if case.facts.precision.startswith("bf16") else "16" if case.facts.precision.startswith("16") else "32"
    )
    eps, top = EPS.get(kind, 1e-7), EXP_LIMIT.get(kind, 88.0)
    operation = str(told.get("operation") or "").lower() if told is not None else ""
    remedy = next((words.format(eps=eps, top=top) for part, words in REMEDIES.items() if part in operation), None)
    safe = (
        f"Where the value is born ({_place(case, told)}): {remedy}."
        if remedy is not None
        else f"Find where it is born ({_place(case, told)}) and keep logarithms, divisions and roots above {eps:g} and the arguments of exp below {top:g}: "
        f"torch.autograd.set_detect_anomaly(True) for batch {case.episode.onset.batch_idx} of epoch {case.episode.onset.epoch} only."
    )
    low = "Run that operation in float32: with torch.autocast(device_type, enabled=False)." if kind != "32" else None
    back = f"Go on from a checkpoint from before step {case.step}: weights that took in NaN do not recover."
    return tuple(filter(None, (safe, low, back)))
