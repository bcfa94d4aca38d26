"""`numerical_instability`.

The model or the loss creates a NaN, Inf or huge value: log(0), exp overflow, x / 0, sqrt at 0.

Seen by: a loss that was in its range and is not finite in the next batch, though the batch itself is finite; a gradient
that is not finite while the loss still is (created in the backward pass); the lab's run of that batch, which names the
module and the operation.

Against it: NaN or Inf in the batch; a loss or gradient that grew over several batches first (then the weights diverged
until they overflowed); an event of the learning rate, whose evidence is subtracted.

Thresholds: finiteness; a finite loss counts from 10,000 times its level in an ordinary batch, or where control batches
under the old weights differ by as much.

To do: the safe form of the operation with an epsilon that suits the precision; back to a checkpoint from before.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import GUARD, NEAR
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if
from lightning_spike.diagnosis.observations.experiments import blown_up, split_of_jump, wild_scatter
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, finite, gradient_in_range
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family

HUGE_LOSS_FACTOR: Final = 1e4
"""Factor over the loss before from which a finite loss in an ordinary batch comes from an operation (x / ~0, exp), not
from training; engineering choice."""
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
    text = "Loss and gradient stayed finite and of the usual order."
    return Observation(text) if BIRTH(view) is None else None


@observer("module blew up", signal="lab/modules")
def _blown_up_module(view: EpisodeView) -> Observation | None:
    """With the same weights and control batches, the loss and the outputs of a module are far larger than before."""
    grown = blown_up(view)
    if grown is None:
        return None
    text = (
        f"With the old weights and batches, the outputs of '{grown[0]}' are {sentences.times(grown[1])} their usual "
        "size: an operation there divides by nearly 0, or grows like exp."
    )
    return Observation(text, observed=grown[1], expected=1.0)


@observer("in the backward pass", signal="grad_norm")
def _backward(view: EpisodeView) -> Observation | None:
    for ordinal in range(max(view.onset - GUARD, 0), view.onset + 1):
        norm, loss = view.at("grad_norm", ordinal), view.at(view.episode.signal, ordinal)
        if norm is not None and not math.isfinite(norm) and finite(loss) is not None:
            return Observation("The gradient was not finite while the loss still was: the backward pass created it.")
    return None


@observer("non-finite loss")
def _nonfinite_loss(view: EpisodeView) -> Observation | None:
    loss = view.at_onset(view.episode.signal)
    if view.kind is not EpisodeKind.NONFINITE and (loss is None or math.isfinite(loss)):
        return None
    return Observation(f"At step {view.step} {view.loss_text}.", expected=view.episode.loss_before)


@observer("huge loss", "huge loss, computation changed")
def _huge_loss(view: EpisodeView) -> Observation | None:
    loss, before = view.at_onset(view.episode.signal), view.episode.loss_before
    if loss is None or before is None or not before > 0.0 or loss < HUGE_LOSS_FACTOR * before:
        return None
    level = "huge loss, computation changed" if view.split is SplitVerdict.COMPUTATION else "huge loss"
    text = f"The loss rose by a factor of {loss / before:.2g} from one batch to the next."
    return Observation(text, level=level, observed=loss, expected=before)


@observer("wild control batches", signal="lab/split")
def _wild_controls(view: EpisodeView) -> Observation | None:
    """Under the old weights, control losses lie orders of magnitude apart."""
    scatter, before = wild_scatter(view), view.episode.loss_before
    if scatter is None:
        return None
    text = (
        f"Under the old weights, control batches with a loss of about {before:.3g} scatter by "
        f"{sentences.number(scatter)}: values blow up in some of them."
    )
    return Observation(text, observed=scatter, expected=before)


BIRTH: Final = first_of("birth", _blown_up_module, _backward, _nonfinite_loss, _huge_loss, _wild_controls)


@observer("in the model", "in the model, weights of the onset", "in the input", signal="lab/first_nonfinite")
def origin(view: EpisodeView) -> Observation | None:
    """Where the lab found the first non-finite value; under the weights of the onset alone its cause came before."""
    found = view.experiments.first_nonfinite
    if found is None:
        return None
    level = "in the model" if found.with_healthy_weights else "in the model, weights of the onset"
    level = "in the input" if found.phase == "input" else level
    return Observation(sentences.first_nonfinite(found), level=level, confirms=judgement.birth_confirms(found))


@observer("finite", "non-finite", signal="batch")
def batch_finite(view: EpisodeView) -> Observation | None:
    """Whether the values of the batch are finite."""
    signals = [f"batch/{leaf}/nonfinite" for leaf in view.leaves("nonfinite")]
    counts = [count for s in signals for at in view.suspect_batches if (count := view.at(s, at)) is not None]
    if not counts or _all_finite(view):
        return None
    if any(count != 0.0 for count in counts):  # NaN as well
        return Observation(f"The batch at step {view.step} holds NaN or Inf already.", level="non-finite")
    text = f"All values of the batch at step {view.step} are finite."
    return Observation(text, level="finite", observed=0.0, expected=0.0)


@observer("grew first", "at once")
def growth_before(view: EpisodeView) -> Observation | None:
    """Whether loss or gradient grew over some batches before the value was created."""
    if _all_finite(view):
        return None
    signal = view.episode.signal
    first, last = view.at_onset(signal), view.worst("grad_norm", view.onset - NEAR, view.onset - 1)
    grew = finite(first) is not None and view.kind is EpisodeKind.NONFINITE
    if grew or (last is not None and last.above and math.isfinite(last.observed)):
        return Observation("Loss or gradient had left their range some batches before.", level="grew first")
    before = finite(view.at(signal, view.onset - 1))
    if before is None:
        return None
    text = f"The loss of the batch before was {before:.3g}, in its range."
    return Observation(text, level="at once", observed=before, expected=view.episode.loss_before)


@observer("float16", signal="precision")
def precision(view: EpisodeView) -> Observation | None:
    """A precision that overflows early."""
    is_half = view.facts.precision.startswith("16")
    return Observation("float16 overflows at 65,504, exp already at 11.") if is_half else None


SPLIT: Final = split_of_jump(frozenset())


def _split_counts(view: EpisodeView) -> bool:
    """Whether the split is evidence: only for finite values, and a scatter over orders of magnitude is no noise."""
    is_noise = view.split is SplitVerdict.NOISE and wild_scatter(view) is not None
    return _all_finite(view) and not is_noise


def _all_finite(view: EpisodeView) -> bool:
    """Whether the episode has only huge values and none that is not finite."""
    ordinals = range(max(view.onset - GUARD, 0), view.onset + 1)
    values = (view.at(name, ordinal) for name in ("grad_norm", view.episode.signal) for ordinal in ordinals)
    return view.kind is not EpisodeKind.NONFINITE and all(v is None or math.isfinite(v) for v in values)


def _place(view: EpisodeView) -> str:
    found = view.experiments.first_nonfinite
    if found is None:
        grown = blown_up(view)
        return "inside the model or the loss" if grown is None else f"in {grown[0]}"
    parts = (f"in {found.module}" if found.module else "", f"by {found.operation}" if found.operation else "")
    return " ".join(filter(None, parts)) or f"in the {found.phase} pass"


def _summary(view: EpisodeView) -> str:
    return f"A non-finite or huge value appeared {_place(view)} at step {view.step}: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    kind = next((kind for kind in ("bf16", "16") if view.facts.precision.startswith(kind)), "32")
    back = Fix(f"Go on from a checkpoint from before step {view.step}: weights that took in NaN do not recover.")
    safe = Fix(_safe_form(view, kind), Change(setting="operation", value=_place(view)))
    if kind == "32":
        return (safe, back)
    return (safe, Fix("Run that operation in float32: with torch.autocast(device_type, enabled=False)."), back)


def _safe_form(view: EpisodeView, kind: str) -> str:
    found, at = view.experiments.first_nonfinite, view.episode.onset
    operation = "" if found is None else (found.operation or "").lower()
    eps, top = EPSILON[kind], EXP_LIMIT[kind]
    form = next((words.format(eps=eps, top=top) for part, words in SAFE_FORMS.items() if part in operation), None)
    if form is not None:
        return f"Where the value appears ({_place(view)}): {form}."
    batch = f"batch {at.batch_idx} of epoch {at.epoch}"
    return (
        f"Find where it appears ({_place(view)}): keep logarithms, divisions and roots above {eps:g} and the arguments "
        f"of exp below {top:g}; use torch.autograd.set_detect_anomaly(True) for {batch} only."
    )


CAUSE: Final = Cause(
    id="numerical_instability",
    family=Family.NUMERICS,
    title="A non-finite value from the model or the loss",
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
        only_if(_split_counts, SPLIT),
    ),
    summary=_summary,
    fixes=_fixes,
)
