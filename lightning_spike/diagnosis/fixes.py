"""Remedies whose values are worked out from the run, in words."""

import math
from collections.abc import Sequence

import numpy as np

from lightning_spike.diagnosis.cause import Fix
from lightning_spike.diagnosis.constants import GUARD, REFERENCE
from lightning_spike.diagnosis.observations.rates import CLIMB, climbed
from lightning_spike.diagnosis.observations.step_length import update_shares
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Recovery

HEADROOM = 1.5
"""Clip this far above the 95th percentile of the healthy norms: ordinary steps stay as they are."""
CAUTIOUS_CUT = 3.0
"""Factor by which a rate is lowered where the run does not show its limit: half an order of magnitude, the usual step
of a rate search."""
DEEP_CUT = 10.0
"""… and where it was lost for good, or a replay has shown that so much helps: the whole order (science.md 2b.6)."""
HELPED = 0.5
"""Share of the damage that a remedy must take away to have helped."""
GENTLE_STEP = 0.01
"""Share of their size by which an update changes the weights at a healthy rate: a tenth of the most, ten times what is
typical later in a training (1e-3; science.md 2.2)."""
MOST_STEP = 0.1
"""… and the most (TheDeepChecker: between 1e-4 and 1e-1)."""
AS_HIGH = 0.7
"""Share of a rate from which an earlier cycle went about as high …"""
MUCH_LOWER = 0.3
"""… and up to which the rate had come down in between."""
FEW_IN_CYCLE = 16
"""Batches at that height without which nothing is said of it."""
MOST_SPANS = 8
"""Runs of dataset indices that are named; the manifest of the dump has them all."""
SGD_WARMUP = 200
"""Updates of warm-up that are advised where no second moment has to settle, at the least."""
WARMUP_SHARE = 0.05
"""… and this share of the run."""


def clip_value(view: EpisodeView) -> float | None:
    """1.5 times the 95th percentile of the healthy gradient norms before the episode; `None` where they are not known."""
    norms = view.before("grad_norm", REFERENCE)
    norms = norms[norms > 0.0]
    return _two_digits(HEADROOM * float(np.quantile(norms, 0.95))) if norms.size >= 4 else None  # noqa: PLR2004 - as EpisodeView.excess asks


def clip_fix(view: EpisodeView) -> tuple[Fix, ...]:
    """Clip by norm at `clip_value`; empty where the run clips as low already or has shown no norms."""
    value, now = clip_value(view), view.facts.gradient_clip_val
    if value is None or (now is not None and view.facts.gradient_clip_algorithm == "norm" and now <= value):
        return ()
    text = (
        f"Clip the gradient norm: Trainer(gradient_clip_val={value:g}), "
        f"which is {HEADROOM:g} times the 95th percentile of this run's healthy norms."
    )
    return (Fix(text, Change(setting="gradient_clip_val", value=value)),)


def lower_peak(view: EpisodeView, signal: str, culprit: float, since: int | None = None) -> tuple[float, str]:
    """A rate to use in place of `culprit`, and why that one.

    The run's usual rate where it has climbed from there; else the highest that it has borne, if updates were of a
    healthy length there; else a third where an earlier cycle of the schedule went as high, the loss has come down
    since, and came back from this one too; else the one that makes updates of a healthy length (`gentle_rate`); else a
    third, or a tenth where the loss was lost for good or the lab's replay has shown that it helps.

    Args:
        view: The episode.
        signal: The series of the rate.
        culprit: The rate that was too high.
        since: Ordinal of the event that brought it, if one did: what was borne before counts whatever the level of the
            loss, if the event went well above it.
    """
    climb = climbed(view)
    if climb is not None and climb.signal == signal and climb.usual < culprit:
        return _two_digits(climb.usual), "that was the run's usual rate before it climbed"
    earlier = None if since is None else _highest_before(view, signal, since)
    new = earlier is not None and CLIMB * earlier <= culprit
    bearable, gentle = earlier if new else view.bearable(signal, culprit), gentle_rate(view, signal)
    if bearable is not None and (gentle is None or bearable <= MOST_STEP / GENTLE_STEP * gentle):
        return _two_digits(bearable), "the loss stayed in its range up to that rate in this run"
    if view.episode.recovery is not Recovery.NEVER and _bore_in_earlier_cycle(view, signal, culprit):
        why = "for an earlier cycle bore that height, though at a higher loss, and this run does not show where the limit lies now"
        return _two_digits(culprit / CAUTIOUS_CUT), f"{CAUTIOUS_CUT:g} times lower, {why}"
    if gentle is not None and CAUTIOUS_CUT * gentle <= culprit:
        longest = GENTLE_STEP * culprit / gentle
        return _two_digits(gentle), (
            f"an update should change the weights by {GENTLE_STEP:.0%} of their size at most, and measured at this run's longest, "
            f"{culprit:.3g} makes that {longest:.2g} times their size"
        )
    cut, why = _cut(view)
    return _two_digits(culprit / cut), f"{cut:g} times lower, {why}"


def _highest_before(view: EpisodeView, signal: str, ordinal: int) -> float | None:
    """The highest rate that some updates before a batch were made with, in no episode; `None` where there were too few."""
    history = view.store.history
    rates = history.series(signal)
    used = np.sort(rates[view.healthy & np.isfinite(rates) & (history.ordinals < ordinal)])
    return float(used[-GUARD]) if used.size >= 2 * GUARD and used[-GUARD] > 0.0 else None


def _bore_in_earlier_cycle(view: EpisodeView, signal: str, culprit: float) -> bool:
    """Whether the rate was about as high before, then low, and the loss is lower now than it was there."""
    history = view.store.history
    rates, losses = history.series(signal), history.series(view.episode.signal)
    known = np.isfinite(rates) & np.isfinite(losses) & view.healthy & (history.ordinals < view.onset)
    high = known & (rates >= AS_HIGH * culprit)
    first = np.flatnonzero(high)
    low = np.flatnonzero(known & (rates <= MUCH_LOWER * culprit))
    if first.size == 0 or low.size == 0 or low[-1] < first[0]:
        return False
    cycle = high & (np.arange(rates.size) < low[-1])
    level = view.episode.loss_before
    return cycle.sum() >= FEW_IN_CYCLE and level is not None and level < float(np.median(losses[cycle]))


def gentle_rate(view: EpisodeView, signal: str) -> float | None:
    """The rate at which the longest update before the onset, for its rate, would have changed the weights by 1 % of their size; `None` where updates were not measured."""
    history = view.store.history
    rows, shares = update_shares(view.store)
    rates = history.series(signal)[rows]
    known = np.isfinite(rates) & (rates > 0.0) & view.healthy[rows] & (history.ordinals[rows] < max(view.onset, 1))
    if not known.any():
        return None
    return GENTLE_STEP / float((shares[known] / rates[known]).max())


def longest_bearable(view: EpisodeView, signal: str) -> float | None:
    """The rate at which that longest update would have changed the weights by a tenth of their size, which is the most; `None` as above."""
    gentle = gentle_rate(view, signal)
    return None if gentle is None else _two_digits(MOST_STEP / GENTLE_STEP * gentle)


def _cut(view: EpisodeView) -> tuple[float, str]:
    """How far to lower a rate whose limit the run does not show, and why."""
    tried = () if view.experiments is None else view.experiments.remedies
    repaired = max((remedy.repaired for remedy in tried if remedy.remedy == "lower_rate"), default=0.0)
    if repaired >= HELPED:
        return DEEP_CUT, "which took most of the damage away when that update was made again"
    if view.episode.end is None and view.episode.recovery is not Recovery.PART:
        return DEEP_CUT, "as the loss was lost for good and this run does not show where the limit lies"
    return CAUTIOUS_CUT, "as this run does not show where its limit lies"


def warmup_steps(view: EpisodeView) -> tuple[int, str]:
    """Updates over which the rate should rise, and why so many: 2 / (1 - beta2) for Adam (Ma & Yarats), but at most a fifth of the run."""
    longest = view.facts.max_steps
    if longest is None and view.facts.max_epochs is not None and view.facts.batches_per_epoch is not None:
        longest = view.facts.max_epochs * view.facts.batches_per_epoch // max(view.facts.accumulate_grad_batches, 1)
    share = WARMUP_SHARE * longest if longest is not None else 0.0
    beta2 = view.beta2
    if beta2 is not None and beta2 < 1.0:
        steps, why = (
            math.ceil(2.0 / (1.0 - beta2) - 1e-6),
            f"2 / (1 - beta2) with beta2 = {beta2:g}, the time Adam's second moment takes to settle",
        )
    else:
        steps, why = max(SGD_WARMUP, math.ceil(share)), "5 % of the run and at least 200"
    if longest is not None and steps > longest // 5 > 0:
        return max(
            longest // 5, 1
        ), f"a fifth of this run's {longest} steps; {why} would be more than the run can spare"
    return steps, why


def dataset_fix(view: EpisodeView, more: str = "") -> Fix:
    """Which samples to look at or leave out; `more` is a further sentence."""
    change = Change(setting="drop_samples", value=view.suspect_indices or None)
    samples = sample_words(view)
    if samples:
        return Fix(f"Drop or mend {samples}{_of_bad_run(view)}.{more}", change)
    at = view.episode.onset
    where = "BadBatchDumper would write it to disk"
    if view.suspect_indices:
        where = "its dump lists the dataset indices"
    text = f"Look at batch {at.batch_idx} of epoch {at.epoch} (step {at.step}) and drop or mend what is wrong in it; {where}."
    return Fix(f"{text}{more}", change)


def _of_bad_run(view: EpisodeView) -> str:
    """`", those of the 8 bad batches from step 218 to 225"`; empty where one batch alone is bad."""
    ordinals = () if view.bad_run is None else view.bad_run.whole_numbers("ordinals")
    last = None if view.bad_run is None else view.bad_run.number("last_step")
    if len(ordinals) <= 1 or last is None:
        return ""
    first = view.step_of(ordinals[0])
    return f", those of the {len(ordinals)} bad batches from step {first} to {last:.0f} (finding suspect_batches lists them all)"


def sample_words(view: EpisodeView) -> str:
    """`"samples 11456-11471 of the dataset"`.

    Those that stand out, or the whole batch of the onset; empty where indices are not known or are a shuffled batch's.
    """
    spans = _spans(view.suspect_indices)
    if not spans or (len(spans) > MOST_SPANS and view.suspects is None and view.bad_run is None):
        return ""
    words = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:MOST_SPANS]]
    more = sum(b - a + 1 for a, b in spans[MOST_SPANS:])
    noun = "sample" if len(spans) == 1 and spans[0][0] == spans[0][1] else "samples"
    return f"{noun} {', '.join(words)}{f' and {more} more' if more else ''} of the dataset"


def _spans(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of whole numbers that follow one another, as first and last."""
    spans: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        if spans and index == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], index)
        else:
            spans.append((index, index))
    return spans


def _two_digits(value: float) -> float:
    """Rounded to two significant digits: more would feign a precision that is not there."""
    return float(f"{value:.2g}")
