"""Whether inputs and targets of the suspect batches are in their usual range, by value or by class frequency."""

import dataclasses
import math
from typing import Final

from lightning_spike.diagnosis.observations.reference_range import SeriesRange, reference_range
from lightning_spike.diagnosis.view import EpisodeView

BEYOND_RANGE_SHARE: Final = 0.25
"""Share of the range's width by which a class statistic must lie outside the range to be unusual. Of 128 values the
next one lies that far above all others with a probability below 1 %; engineering choice."""
CLASS_STATISTICS: Final = ("entropy", "distinct")
"""Statistics of the classes or tokens in a batch."""
MIN_SAMPLES_FOR_SHARE: Final = 4
"""Samples in a batch without which a share of them says nothing; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unusual:
    """An unusual statistic of one leaf of a batch."""

    signal: str
    statistic: str
    observed: float
    usual: float
    ratio: float
    """How far it differs, as a factor of at least 1."""
    text: str


def input_known(view: EpisodeView) -> bool:
    """Whether any statistic of the inputs was recorded at the onset."""
    leaves = [leaf for leaf in (*view.leaves("std"), *class_leaves(view, "input")) if leaf.startswith("input")]
    return any(view.at_onset(f"batch/{leaf}/{name}") is not None for leaf in leaves for name in ("std", "entropy"))


def unusual_input(view: EpisodeView) -> Unusual | None:
    """The most unusual input statistic of the suspect batches; `None` where all are in range."""
    return max([*_values(view, "input"), *_classes(view, "input")], key=lambda u: u.ratio, default=None)


def unusual_target(view: EpisodeView) -> Unusual | None:
    """The most unusual target statistic of the suspect batches; `None` where all are in range."""
    return max([*_values(view, "target"), *_classes(view, "target")], key=lambda u: u.ratio, default=None)


def class_leaves(view: EpisodeView, part: str) -> tuple[str, ...]:
    """The integer leaves of one part (`"input"`, `"target"`) whose classes were counted."""
    return tuple(leaf for leaf in view.leaves("entropy") if leaf.startswith(part))


def differing_samples(view: EpisodeView) -> tuple[float, float, str] | None:
    """Number of outlier samples in the batch, samples in the batch, and a sentence; `None` where they are not known."""
    found = view.suspects
    count, size = (None, None) if found is None else (found.number("count"), found.number("batch_size"))
    if count is None or size is None or size < MIN_SAMPLES_FOR_SHARE:
        return None
    text = f"{count:.0f} of the {size:.0f} samples differ from those of the batches before, under the same weights."
    return count, size, text


def _values(view: EpisodeView, part: str) -> list[Unusual]:
    odd = [(o, o.excess) for at in view.suspect_batches for o in view.oddities(at) if o.leaf.split(".")[0] == part]
    return [
        Unusual(
            signal=o.signal, statistic=o.statistic, observed=e.observed, usual=e.expected, ratio=e.ratio,
            text=f"{o.statistic} of '{o.leaf}' in the batch at step {view.step_of(e.ordinal)} is {e.observed:.3g}, "
            f"usually {e.expected:.3g}.",
        )
        for o, e in odd
    ]  # fmt: skip


def _classes(view: EpisodeView, part: str) -> list[Unusual]:
    first, last = min(view.suspect_batches), max(view.suspect_batches)
    series = [
        (leaf, name, reference_range(view, f"batch/{leaf}/{name}", first, last))
        for leaf in class_leaves(view, part)
        for name in CLASS_STATISTICS
    ]
    found = (_class(view, leaf, name, usual) for leaf, name, usual in series if usual is not None)
    return [unusual for unusual in found if unusual is not None]


def _class(view: EpisodeView, leaf: str, name: str, usual: SeriesRange) -> Unusual | None:
    slack = BEYOND_RANGE_SHARE * (usual.high - usual.low)
    outside = [v for v in usual.values.tolist() if v > usual.high + slack or v < usual.low - slack]
    if not outside:
        return None
    value = max(outside, key=lambda v: abs(v - usual.middle))
    is_entropy = name == "entropy"
    low, high = sorted((math.exp(value), math.exp(usual.middle)) if is_entropy else (value, usual.middle))
    what = "entropy of" if is_entropy else "number of different values in"
    return Unusual(
        signal=usual.signal, statistic=name, observed=value, usual=usual.middle,
        ratio=high / low if low > 0.0 else math.inf,
        text=f"The {what} '{leaf}' at step {view.step} is {value:.3g}, usually {usual.middle:.3g}.",
    )  # fmt: skip
