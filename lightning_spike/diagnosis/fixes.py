"""Remedies whose values are worked out from the run, in words."""

import math
from collections.abc import Sequence

import numpy as np

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.constants import REFERENCE
from lightning_spike.records import Change

__all__ = ["clip_fix", "clip_value", "dataset_fix", "drop_samples", "lower_peak", "sample_words", "warmup_steps"]

HEADROOM = 1.5
"""Clip this far above the 95th percentile of the healthy norms: ordinary steps stay as they are."""
CAUTIOUS_CUT = 3.0
"""Factor by which a rate is lowered where the run does not show its limit: half an order of magnitude, the usual step of a rate search."""
MOST_SPANS = 8
"""Runs of dataset indices that are named; the manifest of the dump has them all."""
SGD_WARMUP = 200
"""Updates of warm-up that are advised where no second moment has to settle, at the least."""
WARMUP_SHARE = 0.05
"""… and this share of the run."""


def clip_value(case: Case) -> float | None:
    """1.5 times the 95th percentile of the healthy gradient norms before the episode; `None` where they are not known."""
    norms = case.before("grad_norm", REFERENCE)
    norms = norms[norms > 0.0]
    return _two_digits(HEADROOM * float(np.quantile(norms, 0.95))) if norms.size >= 4 else None  # noqa: PLR2004 - as Case.excess asks


def clip_fix(case: Case) -> str | None:
    """Clip by norm at `clip_value`; `None` where the run clips as low already or has shown no norms."""
    value, now = clip_value(case), case.facts.gradient_clip_val
    if value is None or (now is not None and case.facts.gradient_clip_algorithm == "norm" and now <= value):
        return None
    return f"Clip the gradient norm: Trainer(gradient_clip_val={value:g}), which is {HEADROOM:g} times the 95th percentile of this run's healthy norms."


def lower_peak(case: Case, signal: str, culprit: float) -> tuple[float, str]:
    """A rate to use in place of `culprit`, and why that one."""
    bearable = case.bearable(signal, culprit)
    if bearable is not None:
        return _two_digits(bearable), "the loss stayed in its range up to that rate in this run"
    return _two_digits(
        culprit / CAUTIOUS_CUT
    ), f"{CAUTIOUS_CUT:g} times lower, as this run does not show where its limit lies"


def warmup_steps(case: Case) -> tuple[int, str]:
    """Updates over which the rate should rise, and why so many: 2 / (1 - beta2) for Adam (Ma & Yarats), but at most a fifth of the run."""
    longest = case.facts.max_steps
    if longest is None and case.facts.max_epochs is not None and case.facts.batches_per_epoch is not None:
        longest = case.facts.max_epochs * case.facts.batches_per_epoch // max(case.facts.accumulate_grad_batches, 1)
    share = WARMUP_SHARE * longest if longest is not None else 0.0
    beta2 = case.beta2
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


def dataset_fix(case: Case) -> str:
    """Which samples to look at or leave out."""
    samples = sample_words(case)
    if not samples:
        at = case.episode.onset
        where = (
            "its dump lists the dataset indices" if case.suspect_indices else "BadBatchDumper would write it to disk"
        )
        return f"Look at batch {at.batch_idx} of epoch {at.epoch} (step {at.step}) and drop or mend what is wrong in it; {where}."
    return f"Drop or mend {samples}."


def drop_samples(case: Case) -> Change:
    """`dataset_fix` for a program."""
    return Change(setting="drop_samples", value=case.suspect_indices or None)


def sample_words(case: Case) -> str:
    """`"samples 11456-11471 of the dataset"`: those that stand out, or the whole batch of the onset; empty where indices are not known or are a shuffled batch's."""
    spans = _spans(case.suspect_indices)
    if not spans or (len(spans) > MOST_SPANS and case.suspects is None):
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
