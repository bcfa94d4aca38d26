"""`bad_batch`: extreme, outlying or corrupt values in one or a few batches."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, Oddity, number
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix, dataset_fix, drop_samples, sample_words
from lightning_spike.diagnosis.observations.batch_parts import unusual_input
from lightning_spike.diagnosis.observations.tells import (
    by_chance,
    early_gradient,
    gradient_in_range,
    jump_without_cause_in_update,
    lone_batch,
    scattered_batches,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Evidence, Family

CLEAR: Final = 3.0
"""Factor between a batch's value and its usual one from which the batch is clearly not like the others: harmless augmentation stays below 2 (science.md 2b.6)."""
EXTREME: Final = 10.0
"""… from which it is broken: a wrong unit, a missing division, a corrupt file."""
CONCENTRATED: Final = 5.0
"""Times the batch's median loss from which single samples carry the jump."""
MOST: Final = 0.5
"""Share of a batch's samples from which it is the batch as a whole that stands out."""
FEWEST: Final = 4
"""Samples in a batch without which such a share says nothing."""
SHORT: Final = 8
"""Batches after which an episode is more than the trace of one batch."""


class BadBatch(Cause):
    """Extreme, outlying or corrupt values in one or a few batches.

    Seen by: the value statistics of the batch at the onset (maximum, spread, mean of every floating leaf) far from those of the last 128
    batches; single samples with losses far above the batch's median; the loss back at once with the next batch; the replay, in which the batch has a high
    loss under the old weights too.

    Against it: ordinary values; a gradient norm that left its range some updates *before* the batch came; a replay that gives the jump to the weights.

    Thresholds: the range of a statistic is that of its own history (`detectors.baseline`), a factor of 3 is clear, one of 10 is
    broken. Batches with no floating leaf (token ids) show no statistics; then samples, shape and replay have to tell.

    To do: drop or mend the samples named, clamp or normalise the leaf that left its range; clipping keeps one such batch from doing damage.
    """

    id: ClassVar = "bad_batch"
    family: ClassVar = Family.DATA
    tested_by: ClassVar = frozenset({"data"})
    title: ClassVar = "A bad batch"
    explains: ClassVar = frozenset({"gradient_explosion", "numerical_instability"})

    @override
    def examine(self, case: Case) -> Examination:
        odd = _oddest(case)
        plain = odd is None and case.suspects is None and unusual_input(case) is None
        if plain and (chance := by_chance(case)) is not None:
            return Examination(evidence=(chance,))
        evidence = without_none(
            _values(case, odd),
            _samples(case),
            lone_batch(case, FAIR),
            _lasting(case),
            _led_by_gradient(case),
            _in_the_batch(case, odd),
            scattered_batches(case, -STRONG),
            split_verdict(
                case,
                {"data": REPLAYED, "both": SLIGHT, "weights": -STRONG, "noise": -STRONG, "not_reproduced": -SLIGHT},
            ),
        )
        return Examination(
            evidence=evidence,
            summary=_summary(case, odd),
            fixes=tuple(filter(None, (dataset_fix(case), _clamp(odd), clip_fix(case)))),
            change=drop_samples(case),
            confirmed={"data": True, "weights": False}.get(case.split or ""),
        )


def _in_the_batch(case: Case, odd: Oddity | None) -> Evidence | None:
    """The loss jumped in the batch itself. Where its values are known to be ordinary, that is as well a batch that is hard, or a fault in the loss."""
    if odd is None and case.batch_is_known:
        return None
    return jump_without_cause_in_update(case, sign=1.0, most=FAIR) or gradient_in_range(case, SLIGHT)


def _oddest(case: Case) -> Oddity | None:
    """The oddest value of the batch at the onset; of the one before only where it is clearly not like the others."""
    now = [o for at in case.questioned for o in case.oddities(at) if not _is_weight(o)]
    if now:
        return max(now, key=lambda o: o.excess.ratio)
    before = [o for o in case.oddities(case.onset - 1) if o.excess.ratio >= CLEAR and not _is_weight(o)]
    return before[0] if before else None


def _is_weight(odd: Oddity) -> bool:
    """Sample weights out of range have a cause of their own."""
    return odd.leaf.split(".")[0] == "weight"


def _values(case: Case, odd: Oddity | None) -> Evidence | None:
    if odd is None:
        tokens = unusual_input(case)
        if tokens is not None:
            weight = DECISIVE if tokens.ratio >= EXTREME else STRONG
            return tell(
                tokens.signal,
                tokens.text,
                weight,
                step=case.step,
                observed=tokens.observed,
                expected=tokens.usual,
            )
        if not case.batch_is_known:
            return None
        return tell("batch", f"The values of the batch at step {case.step} are as usual.", -FAIR, step=case.step)
    ratio = odd.excess.ratio
    weight = DECISIVE if ratio >= EXTREME else STRONG if ratio >= CLEAR else SLIGHT
    return tell(
        odd.signal,
        f"{odd.statistic} of '{odd.leaf}' in {_which(case, odd)} is {odd.excess.observed:.3g}, usually {odd.excess.expected:.3g}.",
        weight if odd.excess.ordinal >= case.onset else 0.5 * weight,
        step=case.step,
        observed=odd.excess.observed,
        expected=odd.excess.expected,
    )


def _which(case: Case, odd: Oddity) -> str:
    return (
        f"the batch at step {case.step_of(odd.excess.ordinal)}"
        if odd.excess.ordinal >= case.onset
        else f"the batch before step {case.step}"
    )


def _samples(case: Case) -> Evidence | None:
    """Whether few samples carry the loss of the batch while the rest of it is ordinary, or most of them are unlike those of the batch before."""
    told = case.suspects
    if told is None:
        return None
    most = _most_of_it(case, told)
    if most is not None:
        return most
    losses = told.get("losses")
    values = [v for v in map(number, losses) if v is not None] if isinstance(losses, list | tuple) else []
    middle, before = number(told.get("median_loss")), case.episode.loss_before
    if not values or middle is None or not middle > 0.0:
        return None
    if before is not None and middle > CLEAR * before:  # the whole batch is hard: its content, or the weights
        return None
    ratio = max(values) / middle
    weight = FAIR if ratio >= CONCENTRATED else -SLIGHT
    text = f"The highest loss of a sample in the batch is {max(values):.3g}, the median {middle:.3g}."
    return tell("batch/sample_loss", text, weight, step=case.step, observed=max(values), expected=middle)


def _most_of_it(case: Case, told: Mapping[str, Any]) -> Evidence | None:
    """Most samples stand out against those of healthy batches: under the same weights, so it is not the weights."""
    count, size = number(told.get("count")), number(told.get("batch_size"))
    if count is None or size is None or size < FEWEST or count < MOST * size:
        return None
    middle = number(told.get("median_loss"))
    losses = "" if middle is None else f" (median loss {middle:.3g})"
    text = f"{count:.0f} of the {size:.0f} samples of that batch{losses} are unlike those of the batches before, under the same weights."
    return tell("batch/sample_loss", text, FAIR, step=case.step, observed=middle, expected=case.episode.loss_before)


def _lasting(case: Case) -> Evidence | None:
    length = case.last - case.onset + 1
    if case.lone or length <= SHORT:
        return None
    return tell(case.episode.signal, f"The loss stayed out of its range for {length} batches.", -SLIGHT, step=case.step)


def _led_by_gradient(case: Case) -> Evidence | None:
    lead = early_gradient(case)
    if lead is None:
        return None
    text = f"The gradient norm had left its range before that batch: {lead.observed:.3g}, usually {lead.expected:.3g}."
    observed = lead.observed if math.isfinite(lead.observed) else None
    return tell("grad_norm", text, -FAIR, step=case.step, observed=observed, expected=lead.expected)


def _summary(case: Case, odd: Oddity | None) -> str:
    if odd is None:
        samples = sample_words(case)
        return f"{_batches(case)}{f' ({samples})' if samples else ''} did it: {case.loss_text}, and not because of the weights."
    seen, usual = odd.excess.observed, odd.excess.expected
    return f"{_which(case, odd).capitalize()} holds values out of range ({odd.statistic} of '{odd.leaf}' {seen:.3g}, usually {usual:.3g}), and {case.loss_text}."


def _batches(case: Case) -> str:
    last = case.episode.end
    if last is None or case.last == case.onset or not case.lone:
        return f"The batch at step {case.step}"
    return f"The batches at steps {case.step} to {last.step}"


def _clamp(odd: Oddity | None) -> str | None:
    if odd is None or odd.excess.z < 0.0:
        return None
    leaf: Mapping[str, str] = {"max_abs": "clamp", "std": "normalise", "mean": "centre"}
    seen, usual = odd.excess.observed, odd.excess.expected
    limit = (
        f" to ±{1.2 * usual:.2g}" if odd.statistic == "max_abs" else f" (its {odd.statistic} is usually {usual:.2g})"
    )
    return f"In the dataset, {leaf[odd.statistic]} '{odd.leaf}'{limit}: healthy batches have a {odd.statistic} of {usual:.2g}, this one has {seen:.2g}."
