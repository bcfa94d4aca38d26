"""`bad_batch`: extreme, outlying or corrupt values in one or a few batches.

Seen by: value statistics of the batch at the onset (maximum, spread, mean of every floating leaf) far from those of the
last 128 batches; single samples with losses far above the batch's median; a loss that recovers with the next batch; a
replay in which the batch has a high loss under the old weights too.

Against it: ordinary values; a gradient norm that left its range some updates *before* the batch came; a replay that
gives the jump to the weights.

Thresholds: the range of a statistic is that of its own history (`detectors.baseline`); a factor of 3 is clear, one of
10 is broken. Batches without a floating leaf (token ids) have no statistics; then samples, shape and replay decide.

To do: drop or correct the named samples, clamp or normalise the leaf that left its range; clipping limits the damage of
one such batch.
"""

from typing import Final

from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, dataset_fix, sample_words
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if
from lightning_spike.diagnosis.observations.batch_parts import differing_samples, unusual_input
from lightning_spike.diagnosis.observations.experiments import chance_maximum, control_scatter, split_of_jump
from lightning_spike.diagnosis.observations.shared_evidence import (
    early_gradient,
    finite,
    gradient_in_range,
    jump_after_ordinary_updates,
    transient_loss,
)
from lightning_spike.diagnosis.view import EpisodeView, Oddity
from lightning_spike.records import Family

CLEAR_FACTOR: Final = 3.0
"""Factor between a value and its usual one from which a batch is clearly odd: harmless augmentation stays below 2
(science.md 2b.6)."""
BROKEN_FACTOR: Final = 10.0
"""Factor from which it is broken: a wrong unit, a missing division, a corrupt file; engineering choice."""
CONCENTRATED_FACTOR: Final = 5.0
"""Multiple of the batch's median loss from which single samples cause the jump; engineering choice."""
WHOLE_BATCH_SHARE: Final = 0.5
"""Share of outlier samples from which the whole batch is bad; engineering choice."""
MAX_BATCHES: Final = 8
"""Batches above which an episode is more than the effect of one batch; engineering choice."""
CLAMP_MARGIN: Final = 1.2
"""The advised clamp as a multiple of the usual maximum; engineering choice."""
REPAIRS: Final = {"max_abs": "clamp", "std": "normalise", "mean": "centre"}


def _is_odd(view: EpisodeView) -> bool:
    """Whether anything about the batch is odd but its loss."""
    return _oddest(view) is not None or view.suspects is not None or unusual_input(view) is not None


@observer("broken", "clearly odd", "odd", "broken before", "clearly odd before", "ordinary")
def values(view: EpisodeView) -> Observation | None:
    """How far the values of the batch lie outside their range."""
    odd = _oddest(view)
    if odd is None:
        return _tokens(view) or _ordinary_values(view)
    level = _level(odd.excess.ratio) if odd.excess.ordinal >= view.onset else f"{_level(odd.excess.ratio)} before"
    seen, usual = odd.excess.observed, odd.excess.expected
    text = f"{odd.statistic} of '{odd.leaf}' in {_which(view, odd)} is {seen:.3g}, usually {usual:.3g}."
    return Observation(text, level=level, signal=odd.signal, observed=seen, expected=usual)


def _tokens(view: EpisodeView) -> Observation | None:
    odd = unusual_input(view)
    if odd is None:
        return None
    level = "broken" if odd.ratio >= BROKEN_FACTOR else "clearly odd"
    return Observation(odd.text, level=level, signal=odd.signal, observed=odd.observed, expected=odd.usual)


def _ordinary_values(view: EpisodeView) -> Observation | None:
    text = f"The values of the batch at step {view.step} are in their usual range."
    return Observation(text, level="ordinary", signal="batch") if view.batch_is_known else None


def _level(ratio: float) -> str:
    if ratio >= BROKEN_FACTOR:
        return "broken"
    return "clearly odd" if ratio >= CLEAR_FACTOR else "odd"


@observer("most samples", signal="batch/sample_loss")
def _most_samples(view: EpisodeView) -> Observation | None:
    """Most samples are outliers among those of healthy batches under the same weights, so the weights are fine."""
    found = differing_samples(view)
    if found is None or view.suspects is None or found[0] < WHOLE_BATCH_SHARE * found[1]:
        return None
    return Observation(found[2], observed=view.suspects.number("median_loss"), expected=view.episode.loss_before)


@observer("concentrated", "spread", signal="batch/sample_loss")
def _few_samples(view: EpisodeView) -> Observation | None:
    """Whether few samples cause the high loss while the others are ordinary."""
    found, before = view.suspects, view.episode.loss_before
    if found is None:
        return None
    losses, middle = found.numbers("losses"), found.number("median_loss")
    if not losses or middle is None or not middle > 0.0:
        return None
    if before is not None and middle > CLEAR_FACTOR * before:  # the whole batch is hard: its content, or the weights
        return None
    level = "concentrated" if max(losses) / middle >= CONCENTRATED_FACTOR else "spread"
    text = f"The highest sample loss in the batch is {max(losses):.3g}, the median {middle:.3g}."
    return Observation(text, level=level, observed=max(losses), expected=middle)


@observer("lasting")
def lasting_loss(view: EpisodeView) -> Observation | None:
    """A loss that stays out of its range is more than the effect of one batch."""
    length = view.last - view.onset + 1
    if view.transient or length <= MAX_BATCHES:
        return None
    return Observation(f"The loss stayed out of its range for {length} batches.")


@observer("gradient first", signal="grad_norm")
def gradient_led(view: EpisodeView) -> Observation | None:
    """A gradient norm that left its range before the batch came."""
    lead = early_gradient(view)
    if lead is None:
        return None
    text = f"The gradient norm left its range before that batch: {lead.observed:.3g}, usually {lead.expected:.3g}."
    return Observation(text, observed=finite(lead.observed), expected=lead.expected)


def _odd_or_unknown(view: EpisodeView) -> bool:
    """Whether values are odd or unknown; a jump with ordinary values fits a hard batch as well."""
    return _oddest(view) is not None or not view.batch_is_known


jump_in_batch = only_if(_odd_or_unknown, first_of("jump_in_batch", jump_after_ordinary_updates, gradient_in_range))
"""The loss jumped in the batch itself."""


def _oddest(view: EpisodeView) -> Oddity | None:
    """The oddest value of the suspect batches; of the batch before only if it is clearly odd."""
    now = [o for at in view.suspect_batches for o in view.oddities(at) if not _is_weight(o)]
    if now:
        return max(now, key=lambda o: o.excess.ratio)
    before = view.oddities(view.onset - 1)
    return next((o for o in before if o.excess.ratio >= CLEAR_FACTOR and not _is_weight(o)), None)


def _is_weight(odd: Oddity) -> bool:
    """Whether the leaf holds sample weights, which have a cause of their own."""
    return odd.leaf.split(".")[0] == "weight"


def _which(view: EpisodeView, odd: Oddity) -> str:
    if odd.excess.ordinal >= view.onset:
        return f"the batch at step {view.step_of(odd.excess.ordinal)}"
    return f"the batch before step {view.step}"


def _summary(view: EpisodeView) -> str:
    odd = _oddest(view)
    if odd is not None:
        seen, usual = odd.excess.observed, odd.excess.expected
        values = f"{odd.statistic} of '{odd.leaf}' {seen:.3g}, usually {usual:.3g}"
        return f"{_which(view, odd).capitalize()} holds values out of range ({values}), and {view.loss_text}."
    samples = sample_words(view)
    named = f" ({samples})" if samples else ""
    end = view.episode.end
    if end is None or view.last == view.onset or not view.transient:
        return f"The batch at step {view.step}{named} caused it, not the weights: {view.loss_text}."
    return f"The batches at steps {view.step} to {end.step}{named} caused it, not the weights: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    return (dataset_fix(view), *_clamp(_oddest(view)), *clip_fix(view))


def _clamp(odd: Oddity | None) -> tuple[Fix, ...]:
    if odd is None or odd.excess.z < 0.0:
        return ()
    seen, usual = odd.excess.observed, odd.excess.expected
    limit = f" to ±{CLAMP_MARGIN * usual:.2g}" if odd.statistic == "max_abs" else ""
    text = f"In the dataset, {REPAIRS[odd.statistic]} '{odd.leaf}'{limit}"
    return (Fix(f"{text}: healthy batches have a {odd.statistic} of {usual:.2g}, this one has {seen:.2g}."),)


TESTED_BY: Final = frozenset({Group.DATA})

CAUSE: Final = Cause(
    id="bad_batch",
    family=Family.DATA,
    title="A bad batch",
    meaning="extreme, outlying or corrupt values in one or a few batches",
    requires=(only_if(lambda view: not _is_odd(view), chance_maximum),),
    observations=(
        values,
        first_of("samples", _most_samples, _few_samples),
        transient_loss,
        lasting_loss,
        gradient_led,
        jump_in_batch,
        control_scatter,
        split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"numerical_instability"}),
    tested_by=TESTED_BY,
)
