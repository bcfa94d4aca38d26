"""Observations that bear on more than one cause, each put into words once; what they weigh is for each cause to say."""

import math
from collections.abc import Iterator, Mapping

from lightning_spike.diagnosis.case import Case, Excess, number
from lightning_spike.diagnosis.constants import DECISIVE, GUARD, NEAR
from lightning_spike.diagnosis.observations.measured import wild_scatter
from lightning_spike.diagnosis.observations.rates import RateEvent, steady_rate
from lightning_spike.records import Evidence

TAKEN_OFF = 2.0
"""Standard deviations that the lab's split takes off a batch's share, for it was picked as the highest of some."""
SLACK = 0.3
"""By which the highest of so many batches may lie further out still."""
GONE = 30.0
"""Times below its usual norm from which a gradient has all but gone: batches of one run differ by far less."""
FAR_GONE = 1000.0
"""… and from which it has in a run whose norms are not steady enough to tell by their range (AUTOTRAINER's ratio)."""
CLEARLY_ODD = 2.0
"""Factor between a batch's value and its expectation below which it may well be chance or harmless."""


def tell(
    signal: str,
    text: str,
    weight: float,
    *,
    step: int | None = None,
    observed: float | None = None,
    expected: float | None = None,
) -> Evidence:
    """An `Evidence`, in one line."""
    return Evidence(signal=signal, step=step, observed=observed, expected=expected, text=text, weight=weight)


def without_none(*items: Evidence | None) -> tuple[Evidence, ...]:
    """The observations that could be made."""
    return tuple(item for item in items if item is not None)


def finite(value: float | None) -> bool:
    """Whether there is a value and it is finite."""
    return value is not None and math.isfinite(value)


def rate_text(event: RateEvent) -> str:
    """What the rate did, and how soon the loss followed."""
    factor = event.factor
    times = f", {factor:.3g} times as high," if factor is not None else ","
    if event.lag <= 0:
        return f"{event.text}{times} with the loss"
    return f"{event.text}{times} {batches(event.lag)} before the loss rose"


def split_verdict(case: Case, weights: Mapping[str, float]) -> Evidence | None:
    """The lab's split of the jump into the share of the batch and that of the weights; `weights` by verdict. `None` where the lab went on to say whose it is."""
    if case.blame:
        return None
    told, verdict = case.lab("split"), case.split
    if told is None or verdict is None or verdict not in weights:
        return None
    share = told.get("data")
    observed = float(share) if isinstance(share, int | float) and math.isfinite(share) else None
    text = told.get("text")
    words = text if isinstance(text, str) and text else f"The replay gives the jump to: {verdict}."
    return tell("lab/split", words, weights[verdict], step=case.step, observed=observed)


def scattered_batches(case: Case, weight: float) -> Evidence | None:
    """With the weights of before, ordinary batches too have losses orders of magnitude apart, which they had not in the training: it is not in one batch."""
    scatter = wild_scatter(case)
    if scatter is None:
        return None
    text = f"With the weights of before, the losses of ordinary batches too scatter by {scatter:.3g}: it is not in one batch."
    return tell("lab/split", text, weight, step=case.step, observed=scatter, expected=case.episode.loss_before)


def by_chance(case: Case) -> Evidence | None:
    """A single batch that lies no further out than the highest of so many does in any run: of n normal values about sqrt(2 ln n) standard deviations. All that is odd about it is its loss."""
    told = case.lab("split") or {}
    data, jump, noise = (number(told.get(key)) for key in ("data", "jump", "noise"))
    if case.split != "data" or not case.lone or data is None or jump is None or noise is None or not noise > 0.0:
        return None
    far, highest = data * jump / noise + TAKEN_OFF, math.sqrt(2.0 * math.log(max(case.onset, 2)))
    if far >= highest + SLACK:
        return None
    text = f"Under healthy weights the batch lies {far:.2g} standard deviations above the others; the highest of {case.onset} ordinary batches lies {highest:.2g} above by chance."
    return tell("lab/split", text, -DECISIVE, step=case.step, observed=far, expected=highest)


def batch_value(case: Case, *, ordinary: float, odd: float) -> Evidence | None:
    """Whether the values of the batch at the onset are like those of the batches before; `None` where they were not recorded."""
    if not case.batch_is_known:
        return None
    clearly = [o for at in case.questioned for o in case.oddities(at) if o.excess.ratio >= CLEARLY_ODD]
    if not clearly:
        return tell("batch", f"The values of the batch at step {case.step} are as usual.", ordinary, step=case.step)
    worst = clearly[0]
    return tell(
        worst.signal,
        f"The batch at step {case.step} is itself unusual: {worst.statistic} of '{worst.leaf}' is {worst.excess.observed:.3g}, "
        f"usually {worst.excess.expected:.3g}.",
        odd,
        step=case.step,
        observed=worst.excess.observed,
        expected=worst.excess.expected,
    )


def lone_batch(case: Case, weight: float) -> Evidence | None:
    """The loss was back at once: the weights bore no damage."""
    if not case.lone:
        return None
    return tell(
        case.episode.signal,
        f"The loss was out of its range for {batches(case.last - case.onset + 1)} and then back at once, so the weights were not damaged.",
        weight,
        step=case.step,
        observed=case.episode.loss_peak if finite(case.episode.loss_peak) else None,
        expected=case.episode.loss_before,
    )


def batches(count: int) -> str:
    """`"one batch"`, `"4 batches"`."""
    return "one batch" if count == 1 else f"{count} batches"


def jump_without_cause_in_update(case: Case, *, sign: float, most: float = DECISIVE) -> Evidence | None:
    """The loss jumped from one batch to the next, and the updates before it were like all others: it is in that batch, not in a step.

    What a step does is first seen in the loss of the next batch, and steps of one size change the loss by alike amounts: that an ordinary one multiplies it
    by k is the less likely the larger k, taken as 1 / k (a heavy tail; a normal one would be surer). `None` where the rise was gradual, where rates or gradient norms are
    not known or one of them had left its range, and where a replay has found the weights at fault: that is measured, this only inferred.

    Args:
        case: The episode.
        sign: +1 for a cause that lies in the batch, -1 for one that acts through a step; a factor on the weight.
        most: Cap of the weight.
    """
    before, first = case.episode.loss_before, case.at_onset(case.episode.signal)
    if not case.sudden or before is None or first is None or case.split == "weights" or not ordinary_updates(case):
        return None
    ratio = first / before if math.isfinite(first) else math.inf
    weight = sign * min(math.log(ratio), most) if ratio > 1.0 else 0.0
    times = f"{ratio:.2g} times as high" if math.isfinite(ratio) else "not finite"
    return tell(
        case.episode.signal,
        f"The loss was {times} from one batch to the next, after updates with ordinary learning rates and gradients.",
        weight,
        step=case.step,
        observed=first if math.isfinite(first) else None,
        expected=before,
    )


def ordinary_updates(case: Case) -> bool:
    """Whether learning rates, gradient norms and, where measured, the sizes of the updates before the onset are known and were as usual."""
    if not steady_rate(case) or case.latest("grad_norm", case.onset - 1) is None or early_gradient(case) is not None:
        return False
    known = any(case.excess("grad_norm", ordinal) is not None for ordinal in range(case.onset - GUARD, case.onset))
    size = case.worst("update_norm", case.onset - NEAR, case.onset - 1)
    return known and (size is None or not size.above)


def early_gradient(case: Case) -> Excess | None:
    """The highest gradient norm of the updates just before the onset, if it was out of its range: it led the loss."""
    found = [e for e in gradient_norms(case, case.onset - GUARD, case.onset - 1) if e.above]
    return max(found, key=lambda e: e.ratio, default=None)


def gradient_all_but_gone(case: Case, weight: float) -> Evidence | None:
    """The gradient norms of the updates just before the onset were a small fraction of the usual: steps like that can do no harm by their own length."""
    recent = list(gradient_norms(case, case.onset - NEAR // 2, case.onset - 1))
    if not recent or not all(e.z < 0.0 and e.ratio >= (GONE if e.odd else FAR_GONE) for e in recent):
        return None
    least = min(recent, key=lambda e: e.z)
    return tell(
        "grad_norm",
        f"Just before, the gradient norm was down to {least.observed:.3g}, usually {least.expected:.3g}.",
        weight,
        step=case.step,
        observed=least.observed,
        expected=least.expected,
    )


def gradient_in_range(case: Case, weight: float) -> Evidence | None:
    """The gradient norms of the updates just before the onset were ordinary."""
    recent = list(gradient_norms(case, case.onset - NEAR, case.onset - 1))
    if not recent or any(e.above for e in recent) or gradient_all_but_gone(case, weight) is not None:
        return None
    highest = max(recent, key=lambda e: e.z)
    return tell(
        "grad_norm",
        f"Up to the batch before, the gradient norm was in its range ({highest.observed:.3g}, usually {highest.expected:.3g}).",
        weight,
        step=case.step,
        observed=highest.observed,
        expected=highest.expected,
    )


def gradient_norms(case: Case, first: int, last: int) -> Iterator[Excess]:
    """How the gradient norms of the batches `first` to `last` stand to the healthy ones before the episode; those that are not known are left out."""
    excesses = (case.excess("grad_norm", ordinal) for ordinal in range(max(first, 0), last + 1))
    return (e for e in excesses if e is not None)
