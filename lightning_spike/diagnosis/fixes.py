"""Fixes with values worked out from the run."""

import math
from collections.abc import Sequence

import numpy as np

from lightning_spike.diagnosis.batch_ranges import GUARD, REFERENCE
from lightning_spike.diagnosis.cause import Fix
from lightning_spike.diagnosis.judgement import CONFIRMING_SHARE
from lightning_spike.diagnosis.observations.rates import CLIMBED_FACTOR, climbed
from lightning_spike.diagnosis.observations.step_length import LONG_STEP_SHARE, MAX_STEP_SHARE, update_shares
from lightning_spike.diagnosis.view import MIN_HEALTHY_VALUES, EpisodeView
from lightning_spike.records import Change, Recovery

CLIP_HEADROOM = 1.5
"""Multiple of the 95th percentile of the healthy norms at which to clip: ordinary steps stay unchanged;
engineering choice."""
CAUTIOUS_CUT = 3.0
"""Factor by which a rate is lowered where the run does not show its limit: half an order of magnitude, the usual step
of a rate search; engineering choice."""
DEEP_CUT = 10.0
"""Factor where the loss was lost for good or replay shows that it helps: one order of magnitude (science.md 2b.6)."""
SIMILAR_HEIGHT = 0.7
"""Share of a rate from which an earlier cycle went about as high; engineering choice."""
BETWEEN_CYCLES = 0.3
"""Share of the rate below which it must have fallen between the cycles; engineering choice."""
MIN_BATCHES_AT_HEIGHT = 16
"""Batches at that height without which an earlier cycle does not count; engineering choice."""
MAX_SPANS = 8
"""Spans of dataset indices in one sentence; the manifest of the dump has them all; engineering choice."""
MIN_SGD_WARMUP = 200
"""Smallest advised warm-up, in updates, for optimizers without second moments; engineering choice."""
SGD_WARMUP_SHARE = 0.05
"""Share of the run that the advised warm-up takes for optimizers without second moments; engineering choice."""


def clip_value(view: EpisodeView) -> float | None:
    """1.5 times the 95th percentile of the healthy gradient norms before the episode; `None` with too few of them."""
    norms = view.before("grad_norm", REFERENCE)
    norms = norms[norms > 0.0]
    return None if norms.size < MIN_HEALTHY_VALUES else _two_digits(CLIP_HEADROOM * float(np.quantile(norms, 0.95)))


def clip_fix(view: EpisodeView) -> tuple[Fix, ...]:
    """Clip the gradient norm at `clip_value`; empty where the run clips as low already or norms are not known."""
    value, now = clip_value(view), view.facts.gradient_clip_val
    if value is None or (now is not None and view.facts.gradient_clip_algorithm == "norm" and now <= value):
        return ()
    text = (
        f"Clip the gradient norm: Trainer(gradient_clip_val={value:g}), "
        f"which is {CLIP_HEADROOM:g} times the 95th percentile of this run's healthy norms."
    )
    return (Fix(text, Change(setting="gradient_clip_val", value=value)),)


def lower_peak(view: EpisodeView, signal: str, culprit: float, since: int | None = None) -> tuple[float, str]:
    """A rate to use in place of `culprit`, and the reason.

    The first of these that the run shows:

    1. The usual rate, where the rate climbed from there.
    2. The highest rate that the run tolerated, if updates had a sound length there.
    3. A third, where an earlier cycle of the schedule went as high, and the loss fell since and recovered now too.
    4. The rate at which updates have a sound length (`sound_rate`), if at most a third.
    5. A tenth where the loss was lost for good or replay shows that this helps, else a third.

    Args:
        view: The episode.
        signal: The series of the rate.
        culprit: The rate that was too high.
        since: Ordinal of the event that raised the rate, if any. If it went well above all rates before, those count as
            tolerated at any level of the loss.
    """
    climb = climbed(view)
    if climb is not None and climb.signal == signal and climb.usual < culprit:
        return _two_digits(climb.usual), "that was the run's usual rate before it climbed"
    earlier = None if since is None else _highest_before(view, signal, since)
    is_new = earlier is not None and CLIMBED_FACTOR * earlier <= culprit
    tolerated, sound = earlier if is_new else view.tolerated_rate(signal, culprit), sound_rate(view, signal)
    if tolerated is not None and (sound is None or tolerated <= MAX_STEP_SHARE / LONG_STEP_SHARE * sound):
        return _two_digits(tolerated), "the loss stayed in its range up to that rate in this run"
    if view.episode.recovery is not Recovery.NEVER and _tolerated_in_earlier_cycle(view, signal, culprit):
        why = (
            "an earlier cycle tolerated that height, though at a higher loss, and this run does not show the limit now"
        )
        return _two_digits(culprit / CAUTIOUS_CUT), f"{CAUTIOUS_CUT:g} times lower, because {why}"
    if sound is not None and CAUTIOUS_CUT * sound <= culprit:
        return _two_digits(sound), (
            f"an update should change the weights by at most {LONG_STEP_SHARE:.0%} of their size; at {culprit:.3g} the "
            f"longest update of this run would be {LONG_STEP_SHARE * culprit / sound:.2g} times their size"
        )
    cut, why = _cut(view)
    return _two_digits(culprit / cut), f"{cut:g} times lower, {why}"


def _highest_before(view: EpisodeView, signal: str, ordinal: int) -> float | None:
    """The highest rate of several healthy updates before a batch; `None` where there were too few."""
    history = view.store.history
    rates = history.series(signal)
    used = np.sort(rates[view.healthy & np.isfinite(rates) & (history.ordinals < ordinal)])
    return float(used[-GUARD]) if used.size >= 2 * GUARD and used[-GUARD] > 0.0 else None


def _tolerated_in_earlier_cycle(view: EpisodeView, signal: str, culprit: float) -> bool:
    """Whether the rate was about as high before, then low, and the loss is lower now than it was then."""
    history, level = view.store.history, view.episode.loss_before
    rates, losses = history.series(signal), history.series(view.episode.signal)
    known = np.isfinite(rates) & np.isfinite(losses) & view.healthy & (history.ordinals < view.onset)
    high = known & (rates >= SIMILAR_HEIGHT * culprit)
    low = np.flatnonzero(known & (rates <= BETWEEN_CYCLES * culprit))
    cycle = high & (np.arange(rates.size) < (low[-1] if low.size else 0))
    return cycle.sum() >= MIN_BATCHES_AT_HEIGHT and level is not None and level < float(np.median(losses[cycle]))


def sound_rate(view: EpisodeView, signal: str) -> float | None:
    """The rate at which the longest update so far would change the weights by 1 %; `None` where none was measured."""
    history = view.store.history
    rows, shares = update_shares(view.store)
    rates = history.series(signal)[rows]
    known = np.isfinite(rates) & (rates > 0.0) & view.healthy[rows] & (history.ordinals[rows] < max(view.onset, 1))
    return LONG_STEP_SHARE / float((shares[known] / rates[known]).max()) if known.any() else None


def highest_sound_rate(view: EpisodeView, signal: str) -> float | None:
    """The rate at which the longest update so far would change the weights by 10 %, the limit; `None` as above."""
    sound = sound_rate(view, signal)
    return None if sound is None else _two_digits(MAX_STEP_SHARE / LONG_STEP_SHARE * sound)


def _cut(view: EpisodeView) -> tuple[float, str]:
    """How far to lower a rate whose limit the run does not show, and why."""
    tried = view.experiments.remedies
    repaired = max((remedy.repaired for remedy in tried if remedy.remedy == "lower_rate"), default=0.0)
    if repaired >= CONFIRMING_SHARE:
        return DEEP_CUT, "which removed most of the damage when that update was replayed"
    if view.episode.end is None and view.episode.recovery is not Recovery.PART:
        return DEEP_CUT, "because the loss was lost for good and this run does not show the limit"
    return CAUTIOUS_CUT, "because this run does not show the limit"


def warmup_steps(view: EpisodeView) -> tuple[int, str]:
    """Updates over which the rate should rise, and the reason.

    2 / (1 - beta2) for Adam (Ma & Yarats 2021), else 5 % of the run and at least 200; at most a fifth of the run.
    """
    facts, run = view.facts, view.facts.max_steps
    if run is None and facts.max_epochs is not None and facts.batches_per_epoch is not None:
        run = facts.max_epochs * facts.batches_per_epoch // max(facts.accumulate_grad_batches, 1)
    beta2 = view.beta2
    if beta2 is not None and beta2 < 1.0:
        steps = math.ceil(2.0 / (1.0 - beta2) - 1e-6)
        why = f"2 / (1 - beta2) with beta2 = {beta2:g}, the time that Adam's second moment takes to settle"
    else:
        steps, why = max(MIN_SGD_WARMUP, math.ceil(SGD_WARMUP_SHARE * (run or 0))), "5 % of the run and at least 200"
    if run is not None and steps > run // 5 > 0:
        return run // 5, f"a fifth of this run's {run} steps; {why} would be more than the run can spare"
    return steps, why


def dataset_fix(view: EpisodeView, more: str = "") -> Fix:
    """The samples to drop or correct; `more` is a further sentence."""
    change = Change(setting="drop_samples", value=view.suspect_indices or None)
    samples = sample_words(view)
    if samples:
        return Fix(f"Drop or correct {samples}{_of_bad_run(view)}.{more}", change)
    at = view.episode.onset
    where = "its dump lists the dataset indices" if view.suspect_indices else "BadBatchDumper writes it to disk"
    batch = f"batch {at.batch_idx} of epoch {at.epoch} (step {at.step})"
    return Fix(f"Look at {batch} and drop or correct what is wrong in it; {where}.{more}", change)


def _of_bad_run(view: EpisodeView) -> str:
    """`", those of the 8 bad batches from step 218 to 225"`; empty where only one batch is bad."""
    ordinals = () if view.bad_run is None else view.bad_run.whole_numbers("ordinals")
    last = None if view.bad_run is None else view.bad_run.number("last_step")
    if len(ordinals) <= 1 or last is None:
        return ""
    steps = f"from step {view.step_of(ordinals[0])} to {last:.0f}"
    return f", those of the {len(ordinals)} bad batches {steps} (finding suspect_batches lists them all)"


def sample_words(view: EpisodeView) -> str:
    """`"samples 11456-11471 of the dataset"`: the outliers, or all samples of the batch.

    Empty where indices are not known, or where they are those of a whole shuffled batch.
    """
    spans = _spans(view.suspect_indices)
    if not spans or (len(spans) > MAX_SPANS and view.suspects is None and view.bad_run is None):
        return ""
    words = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:MAX_SPANS]]
    more = sum(b - a + 1 for a, b in spans[MAX_SPANS:])
    noun = "sample" if len(spans) == 1 and spans[0][0] == spans[0][1] else "samples"
    return f"{noun} {', '.join(words)}{f' and {more} more' if more else ''} of the dataset"


def _spans(indices: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each group of consecutive numbers."""
    spans: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        first = spans.pop()[0] if spans and index == spans[-1][1] + 1 else index
        spans.append((first, index))
    return spans


def _two_digits(value: float) -> float:
    """The value rounded to two significant digits: more would feign precision."""
    return float(f"{value:.2g}")
