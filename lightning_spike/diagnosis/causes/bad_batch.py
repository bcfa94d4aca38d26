"""`bad_batch`: extreme, outlying or corrupt values in one or a few batches.

Seen by: value statistics of the batch at the onset (maximum, spread, mean of every floating leaf) far from those of the
last 128 batches; single samples with losses far above the batch's median; a loss that is back with the next batch; a
replay in which the batch has a high loss under the old weights too.

Against it: ordinary values; a gradient norm that left its range some updates *before* the batch came; a replay that
gives the jump to the weights.

Thresholds: the range of a statistic is that of its own history (`detectors.baseline`); a factor of 3 is clear, one of
10 is broken. Batches without a floating leaf (token ids) show no
statistics; then samples, shape and replay have to tell.

To do: drop or mend the samples named, clamp or normalise the leaf that left its range; clipping keeps one such batch
from doing damage.
"""

from typing import Final

from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix, dataset_fix, sample_words
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, first_of, observer
from lightning_spike.diagnosis.observations.batch_parts import unusual_input
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

CLEARLY_ODD: Final = 3.0
"""Factor between a value and its usual one from which a batch is clearly odd: harmless augmentation stays below 2
(science.md 2b.6)."""
BROKEN: Final = 10.0
"""… from which it is broken: a wrong unit, a missing division, a corrupt file."""
CONCENTRATED: Final = 5.0
"""Times the batch's median loss from which single samples carry the jump; engineering choice."""
WHOLE_BATCH_SHARE: Final = 0.5
"""Share of a batch's samples from which the batch as a whole stands out; engineering choice."""
MIN_SAMPLES_FOR_SHARE: Final = 4
"""Samples in a batch without which such a share says nothing; engineering choice."""
MAX_BATCHES: Final = 8
"""Batches after which an episode is more than the trace of one batch; engineering choice."""
CLAMP_MARGIN: Final = 1.2
"""The clamp that is advised, in usual maxima; engineering choice."""
REPAIRS: Final = {"max_abs": "clamp", "std": "normalise", "mean": "centre"}


@observer("ordinary maximum", name="chance_maximum")
def only_a_chance_maximum(view: EpisodeView) -> Observation | None:
    """A batch that is odd in nothing but its loss, which is no higher than the highest of so many by chance."""
    is_odd = _oddest(view) is not None or view.suspects is not None or unusual_input(view) is not None
    return None if is_odd else chance_maximum(view)


@observer("broken", "clearly odd", "odd", "broken before", "clearly odd before", "ordinary")
def values(view: EpisodeView) -> Observation | None:
    """How far the values of the batch lie outside their range."""
    odd = _oddest(view)
    if odd is None:
        return _tokens(view) or _ordinary_values(view)
    level = _level(odd.excess.ratio) if odd.excess.ordinal >= view.onset else f"{_level(odd.excess.ratio)} before"
    seen, usual = odd.excess.observed, odd.excess.expected
    text = f"{odd.statistic} of '{odd.leaf}' in {_which(view, odd)} is {seen:.3g}, usually {usual:.3g}."
    return Observation(level=level, text=text, signal=odd.signal, step=view.step, observed=seen, expected=usual)


def _tokens(view: EpisodeView) -> Observation | None:
    odd = unusual_input(view)
    if odd is None:
        return None
    level = "broken" if odd.ratio >= BROKEN else "clearly odd"
    return Observation(
        level=level, text=odd.text, signal=odd.signal, step=view.step, observed=odd.observed, expected=odd.usual
    )


def _ordinary_values(view: EpisodeView) -> Observation | None:
    if not view.batch_is_known:
        return None
    text = f"The values of the batch at step {view.step} are in their usual range."
    return Observation(level="ordinary", text=text, signal="batch", step=view.step)


def _level(ratio: float) -> str:
    if ratio >= BROKEN:
        return "broken"
    return "clearly odd" if ratio >= CLEARLY_ODD else "odd"


@observer("most samples")
def _most_samples(view: EpisodeView) -> Observation | None:
    """Most samples stand out against those of healthy batches under the same weights, so the weights are not the reason."""
    found = view.suspects
    count, size = (None, None) if found is None else (found.number("count"), found.number("batch_size"))
    if found is None or count is None or size is None:
        return None
    if size < MIN_SAMPLES_FOR_SHARE or count < WHOLE_BATCH_SHARE * size:
        return None
    middle = found.number("median_loss")
    text = f"{count:.0f} of the {size:.0f} samples differ from those of the batches before, under the same weights."
    return Observation(
        level="most samples", text=text, signal="batch/sample_loss", step=view.step,
        observed=middle, expected=view.episode.loss_before,
    )  # fmt: skip


@observer("concentrated", "spread")
def _few_samples(view: EpisodeView) -> Observation | None:
    """Whether few samples carry the loss of the batch while the rest of it is ordinary."""
    found, before = view.suspects, view.episode.loss_before
    if found is None:
        return None
    losses, middle = found.numbers("losses"), found.number("median_loss")
    if not losses or middle is None or not middle > 0.0:
        return None
    if before is not None and middle > CLEARLY_ODD * before:  # the whole batch is hard: its content, or the weights
        return None
    level = "concentrated" if max(losses) / middle >= CONCENTRATED else "spread"
    text = f"The highest sample loss in the batch is {max(losses):.3g}, the median {middle:.3g}."
    return Observation(
        level=level, text=text, signal="batch/sample_loss", step=view.step, observed=max(losses), expected=middle
    )


@observer("lasting")
def lasting_loss(view: EpisodeView) -> Observation | None:
    """A loss that stays out of its range is more than the trace of one batch."""
    length = view.last - view.onset + 1
    if view.transient or length <= MAX_BATCHES:
        return None
    text = f"The loss stayed out of its range for {length} batches."
    return Observation(level="lasting", text=text, signal=view.episode.signal, step=view.step)


@observer("gradient first")
def gradient_led(view: EpisodeView) -> Observation | None:
    """A gradient norm that left its range before the batch came."""
    lead = early_gradient(view)
    if lead is None:
        return None
    text = f"The gradient norm left its range before that batch: {lead.observed:.3g}, usually {lead.expected:.3g}."
    return Observation(
        level="gradient first", text=text, signal="grad_norm", step=view.step,
        observed=finite(lead.observed), expected=lead.expected,
    )  # fmt: skip


@observer(*jump_after_ordinary_updates.levels, *gradient_in_range.levels)
def jump_in_batch(view: EpisodeView) -> Observation | None:
    """The loss jumped in the batch itself.

    Said of values that are odd or unknown, for ordinary ones fit a hard batch as well.
    """
    if _oddest(view) is None and view.batch_is_known:
        return None
    return jump_after_ordinary_updates(view) or gradient_in_range(view)


def _oddest(view: EpisodeView) -> Oddity | None:
    """The oddest value of the batch at the onset; of the one before only where it is clearly odd."""
    now = [o for at in view.suspect_batches for o in view.oddities(at) if not _is_weight(o)]
    if now:
        return max(now, key=lambda o: o.excess.ratio)
    before = view.oddities(view.onset - 1)
    return next((o for o in before if o.excess.ratio >= CLEARLY_ODD and not _is_weight(o)), None)


def _is_weight(odd: Oddity) -> bool:
    """Sample weights out of range have a cause of their own."""
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
    requires=(only_a_chance_maximum,),
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
