"""`numerical_instability`.

A non-finite or huge value is born inside the model or loss: log(0), exp overflow, x / 0, sqrt at 0.

Seen by: a loss that was in its range and is not finite in the next batch, though the batch itself is finite; a gradient
that is not finite while the loss still is (born in the backward pass); the lab's run of that batch, which names the
module and the operation.

Against it: NaN or Inf in the batch; a loss or gradient that grew over several batches first (then weights ran away, and
overflow is the end of it); an event of the learning rate, which takes this evidence away.

Thresholds: none but finiteness; a finite loss counts from 10,000 times its level in an ordinary batch, or where control
batches with the weights of before differ by as much.

To do: the safe form of the operation with an epsilon that suits the precision; back to a checkpoint from before.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.constants import GUARD, NEAR
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer
from lightning_spike.diagnosis.observations.experiments import blown_up, split_of_jump, wild_scatter
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, gradient_in_range
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import FirstNonFinite
from lightning_spike.records import Change, EpisodeKind, Family

HUGE_LOSS: Final = 1e4
"""Factor over the loss before from which a finite loss in an ordinary batch may come from an operation (x / ~0, exp),
not from training; engineering choice."""
SAFE_FORMS: Final = {
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
EPSILON: Final = {"16": 1e-4, "bf16": 1e-6, "32": 1e-7}
"""Smallest safe epsilon by precision; of the square root of 1e-7 float32 still resolves 2e-4."""
EXP_LIMIT: Final = {"16": 11.0, "bf16": 88.0, "32": 88.0}
"""Argument at which exp overflows: 11.09 in float16, 88.72 in float32 and bfloat16 (science.md 2.2)."""


@observer("stayed finite")
def value_born(view: EpisodeView) -> Observation | None:
    """The premise: a non-finite or huge value appeared."""
    if BIRTH(view) is not None:
        return None
    text = "Loss and gradient stayed finite and of the usual order."
    return Observation(level="stayed finite", text=text, signal=view.episode.signal, step=view.step)


@observer("module blew up")
def _blown_up_module(view: EpisodeView) -> Observation | None:
    """The same weights and control batches give a far higher loss than before, and so do the outputs of a module."""
    grown = blown_up(view)
    if grown is None:
        return None
    text = (
        f"With the weights and batches from before, the outputs of '{grown[0]}' are {sentences.times(grown[1])} "
        "their usual size: an operation there divides by nearly 0, or grows like exp."
    )
    return Observation(
        level="module blew up", text=text, signal="lab/modules", step=view.step, observed=grown[1], expected=1.0
    )


@observer("in the backward pass")
def _backward(view: EpisodeView) -> Observation | None:
    for ordinal in range(max(view.onset - GUARD, 0), view.onset + 1):
        norm, loss = view.at("grad_norm", ordinal), view.at(view.episode.signal, ordinal)
        if norm is not None and not math.isfinite(norm) and loss is not None and math.isfinite(loss):
            text = "The gradient was not finite while the loss still was: born in the backward pass."
            return Observation(level="in the backward pass", text=text, signal="grad_norm", step=view.step)
    return None


@observer("non-finite loss")
def _nonfinite_loss(view: EpisodeView) -> Observation | None:
    loss = view.at_onset(view.episode.signal)
    if view.kind is not EpisodeKind.NONFINITE and (loss is None or math.isfinite(loss)):
        return None
    text = f"At step {view.step} {view.loss_text}."
    return Observation(
        level="non-finite loss",
        text=text,
        signal=view.episode.signal,
        step=view.step,
        expected=view.episode.loss_before,
    )


@observer("huge loss", "huge loss, computation changed")
def _huge_loss(view: EpisodeView) -> Observation | None:
    loss, before = view.at_onset(view.episode.signal), view.episode.loss_before
    if loss is None or before is None or not before > 0.0 or loss < HUGE_LOSS * before:
        return None
    computed = view.split is SplitVerdict.COMPUTATION
    text = f"The loss rose by a factor of {loss / before:.2g} from one batch to the next."
    return Observation(
        level="huge loss, computation changed" if computed else "huge loss", text=text, signal=view.episode.signal,
        step=view.step, observed=loss, expected=before,
    )  # fmt: skip


@observer("wild control batches")
def _wild_controls(view: EpisodeView) -> Observation | None:
    """With the weights from before, control batches have losses thousands of times apart."""
    scatter, before = wild_scatter(view), view.episode.loss_before
    if scatter is None:
        return None
    text = (
        f"With the weights from before, control batches with a loss of about {before:.3g} scatter by "
        f"{sentences.number(scatter)}: values blow up in some of them."
    )
    return Observation(
        level="wild control batches", text=text, signal="lab/split", step=view.step, observed=scatter, expected=before
    )


BIRTH: Final = first_of("birth", _blown_up_module, _backward, _nonfinite_loss, _huge_loss, _wild_controls)


@observer("in the model", "in the model, weights of the onset", "in the input")
def origin(view: EpisodeView) -> Observation | None:
    """Where the lab found the first non-finite value.

    Where only the weights of the onset give it, what made them so came before.
    """
    found = _first_nonfinite(view)
    if found is None:
        return None
    level = "in the input"
    if found.phase != "input":
        level = "in the model" if found.with_healthy_weights else "in the model, weights of the onset"
    return Observation(
        level=level, text=sentences.first_nonfinite(found), signal="lab/first_nonfinite", step=view.step,
        confirms=judgement.birth_confirms(found),
    )  # fmt: skip


@observer("finite", "non-finite")
def batch_finite(view: EpisodeView) -> Observation | None:
    """Whether the values of the batch are finite."""
    signals = [f"batch/{leaf}/nonfinite" for leaf in view.leaves("nonfinite")]
    counts = [count for s in signals for at in view.suspect_batches if (count := view.at(s, at)) is not None]
    if not counts or _all_finite(view):
        return None
    if any(count != 0.0 for count in counts):  # NaN as well
        text = f"The batch at step {view.step} holds NaN or Inf already."
        return Observation(level="non-finite", text=text, signal="batch", step=view.step)
    text = f"All values of the batch at step {view.step} are finite."
    return Observation(level="finite", text=text, signal="batch", step=view.step, observed=0.0, expected=0.0)


@observer("grew first", "at once")
def growth_before(view: EpisodeView) -> Observation | None:
    """Whether loss or gradient grew over some batches before the value was born."""
    if _all_finite(view):
        return None
    signal = view.episode.signal
    first, last = view.at_onset(signal), view.worst("grad_norm", view.onset - NEAR, view.onset - 1)
    grew = first is not None and math.isfinite(first) and view.kind is EpisodeKind.NONFINITE
    if grew or (last is not None and last.above and math.isfinite(last.observed)):
        text = "Loss or gradient had left their range some batches before."
        return Observation(level="grew first", text=text, signal=signal, step=view.step)
    before = view.at(signal, view.onset - 1)
    if before is None or not math.isfinite(before):
        return None
    text = f"The loss of the batch before was {before:.3g}, in its range."
    return Observation(
        level="at once", text=text, signal=signal, step=view.step, observed=before, expected=view.episode.loss_before
    )


@observer("float16")
def precision(view: EpisodeView) -> Observation | None:
    """A precision that overflows early."""
    if not view.facts.precision.startswith("16"):
        return None
    text = "float16 overflows at 65,504, exp already at 11."
    return Observation(level="float16", text=text, signal="precision", step=view.step)


def _split_of_huge_values() -> Observer:
    """The split, said of finite values alone; scatter that is wild is no noise."""
    split = split_of_jump(frozenset())

    def observe(view: EpisodeView) -> Observation | None:
        found = split(view) if _all_finite(view) else None
        is_noise = found is not None and found.level == SplitVerdict.NOISE
        return None if is_noise and wild_scatter(view) is not None else found

    return Observer(split.name, split.levels, observe)


def _first_nonfinite(view: EpisodeView) -> FirstNonFinite | None:
    return None if view.experiments is None else view.experiments.first_nonfinite


def _all_finite(view: EpisodeView) -> bool:
    """Only a huge value, none that is not finite: then finite values in the batch say nothing."""
    ordinals = range(max(view.onset - GUARD, 0), view.onset + 1)
    values = (view.at(name, ordinal) for name in ("grad_norm", view.episode.signal) for ordinal in ordinals)
    return view.kind is not EpisodeKind.NONFINITE and all(v is None or math.isfinite(v) for v in values)


def _place(view: EpisodeView) -> str:
    found = _first_nonfinite(view)
    if found is None:
        grown = blown_up(view)
        return "inside the model or the loss" if grown is None else f"in {grown[0]}"
    parts = (f"in {found.module}" if found.module else "", f"by {found.operation}" if found.operation else "")
    return " ".join(filter(None, parts)) or f"in the {found.phase} pass"


def _summary(view: EpisodeView) -> str:
    return f"A non-finite or huge value was born {_place(view)} at step {view.step}: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    kind = next((kind for kind in ("bf16", "16") if view.facts.precision.startswith(kind)), "32")
    back = Fix(f"Go on from a checkpoint from before step {view.step}: weights that took in NaN do not recover.")
    safe = Fix(_safe_form(view, kind), Change(setting="operation", value=_place(view)))
    if kind == "32":
        return (safe, back)
    return (safe, Fix("Run that operation in float32: with torch.autocast(device_type, enabled=False)."), back)


def _safe_form(view: EpisodeView, kind: str) -> str:
    found, at = _first_nonfinite(view), view.episode.onset
    operation = "" if found is None else (found.operation or "").lower()
    eps, top = EPSILON[kind], EXP_LIMIT[kind]
    form = next((words.format(eps=eps, top=top) for part, words in SAFE_FORMS.items() if part in operation), None)
    if form is not None:
        return f"Where the value is born ({_place(view)}): {form}."
    return (
        f"Find where it is born ({_place(view)}): keep logarithms, divisions and roots above {eps:g} and the arguments of exp "
        f"below {top:g}; torch.autograd.set_detect_anomaly(True) for batch {at.batch_idx} of epoch {at.epoch} only."
    )


CAUSE: Final = Cause(
    id="numerical_instability",
    family=Family.NUMERICS,
    title="A non-finite value is born in the model or the loss",
    meaning="the model or loss creates a NaN, Inf or huge value: log(0), exp overflow, x/0",
    requires=(value_born,),
    observations=(
        BIRTH,
        origin,
        batch_finite,
        growth_before,
        gradient_in_range,
        batch_values,
        precision,
        _split_of_huge_values(),
    ),
    summary=_summary,
    fixes=_fixes,
)
