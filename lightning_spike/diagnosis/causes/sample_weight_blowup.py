"""`sample_weight_blowup`: dynamic sample weights (hard-example mining) grow out of hand.

Seen by: the largest weight of the batches before and at the onset far above all earlier weights; the effective sample
size (sum w)^2 / sum w^2 below its range, so that few samples make the step; batch after batch, not in one.

Against it: no weights in the batches; weights in their range.

Thresholds: the range is that of up to 128 batches that end 48 before the onset, because a slow growth affects the
nearer ones.

To do: cap the weights at what they were while training went well; normalise them to a mean of 1 in each batch.
"""

import math
from typing import Final

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import clip_fix
from lightning_spike.diagnosis.observation import Observation, observer, premise
from lightning_spike.diagnosis.observations.reference_range import (
    MIN_STRETCH_BATCHES,
    RECENT_BATCHES,
    SeriesRange,
    Stretch,
    longest,
    parts,
    reference_range,
)
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family

LARGE_WEIGHT: Final = 2.0
"""Multiple of the usual largest weight from which weights are clearly out of range: ordinary reweighting differs by
less; engineering choice."""
DOMINANT_WEIGHT: Final = 5.0
"""Multiple from which a few samples dominate the batch; engineering choice."""
CAP_MARGIN: Final = 1.5
"""The advised cap as a multiple of the usual largest weight: ordinary weights stay unchanged; engineering choice."""


has_weights = premise(
    "has_weights", lambda view: view.once(_largest) is not None, "no weights",
    "No sample weights were seen in the batches.", signal="batch/weight/max_abs",
)  # fmt: skip
"""The premise: batches with sample weights."""


@observer("dominant", "large", "in range")
def largest_weight(view: EpisodeView) -> Observation | None:
    """The largest weight of a batch around the onset."""
    found = view.once(_largest)
    if found is None:
        return None
    leaf, series = found
    worst, usual = _worst(view, series), series.middle
    level = _size_level(series.times(worst)) if worst > series.high else "in range"
    text = f"The largest weight of '{leaf}' around step {view.step} is {worst:.3g}, usually {usual:.3g}."
    return Observation(text, level=level, signal=series.signal, observed=worst, expected=usual)


def _size_level(times: float) -> str:
    if times >= DOMINANT_WEIGHT:
        return "dominant"
    return "large" if times >= LARGE_WEIGHT else "in range"


@observer("growing")
def growing_weights(view: EpisodeView) -> Observation | None:
    """Weights above all earlier ones batch after batch."""
    found = view.once(_largest)
    out = None if found is None else _grown(view, found[1])
    if found is None or out is None:
        return None
    (leaf, series), step = found, view.step_of(out.first)
    text = f"The largest weight of '{leaf}' lay above all earlier ones in {batches(out.count)} from step {step} on."
    return Observation(text, signal=series.signal, step=step, observed=out.furthest, expected=series.middle)


@observer("small")
def effective_samples(view: EpisodeView) -> Observation | None:
    """Few samples make the step; a normal effective size refutes nothing, as all weights may grow alike."""
    found = view.once(_largest)
    if found is None:
        return None
    series = reference_range(view, f"batch/{found[0]}/ess", view.onset - GUARD, max(view.suspect_batches))
    if series is None or not math.isfinite(series.middle) or not float(series.values.min()) < series.low:
        return None
    least, usual = float(series.values.min()), series.middle
    text = f"The weights leave {least:.0%} of a batch's samples effective (Kish), usually {usual:.0%}."
    return Observation(text, signal=series.signal, observed=least, expected=usual)


def _largest(view: EpisodeView) -> tuple[str, SeriesRange] | None:
    """The leaf of weights that is furthest above its range, with its series; `None` without weights."""
    first, last = view.onset - RECENT_BATCHES, _last_start(view) + GUARD
    leaves = parts(view, "weight", "max_abs")
    found = [(n, s) for n in leaves if (s := reference_range(view, f"batch/{n}/max_abs", first, last)) is not None]
    return max(found, key=lambda pair: pair[1].times(_worst(view, pair[1])), default=None)


def _worst(view: EpisodeView, series: SeriesRange) -> float:
    """The largest weight up to the onset; a later one where weights go on growing or none is known before."""
    grown = _grown(view, series)
    if grown is not None:
        return grown.furthest
    before = series.values[series.ordinals <= max(view.suspect_batches)]
    return float(before[-GUARD:].max()) if before.size else float(series.values.max())


def _grown(view: EpisodeView, series: SeriesRange) -> Stretch | None:
    """The batches in a row, from the onset or before on, with weights above all earlier ones; `None` without them."""
    out = longest(s for s in series.stretches(above=True) if s.first <= _last_start(view))
    return out if out is not None and out.count >= MIN_STRETCH_BATCHES else None


def _last_start(view: EpisodeView) -> int:
    """The last batch from which on weights can have caused the episode."""
    return max(view.suspect_batches) + view.dated_early


def _summary(view: EpisodeView) -> str:
    found = view.once(_largest)
    if found is None:
        return f"Sample weights grew, and {view.loss_text}."
    worst, usual = _worst(view, found[1]), found[1].middle
    return f"The largest sample weight of a batch is {worst:.3g}, usually {usual:.3g}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    found = view.once(_largest)
    formula = "(weight * losses).sum() / weight.sum()"
    normalise = Fix(f"Normalise weights in each batch, so that the loss keeps its scale: {formula}.")
    if found is None:
        return (normalise,)
    cap = float(f"{CAP_MARGIN * found[1].middle:.2g}")
    text = (
        f"Cap the sample weights: weight = weight.clamp(max={cap:g}), "
        f"{CAP_MARGIN:g} times the usual largest weight of a batch ({found[1].middle:.3g})."
    )
    return (Fix(text, Change(setting="sample_weight_limit", value=cap)), normalise, *clip_fix(view))


CAUSE: Final = Cause(
    id="sample_weight_blowup",
    family=Family.DATA,
    title="Sample weights out of hand",
    meaning="dynamic sample weights (hard-example mining) grow out of hand",
    requires=(has_weights,),
    observations=(largest_weight, growing_weights, effective_samples),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"bad_batch", "label_noise", "hard_sample_streak", "lr_too_high", "numerical_instability"}),
)
