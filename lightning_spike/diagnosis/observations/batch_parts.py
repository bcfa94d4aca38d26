"""Whether the inputs and the targets of the batch that is questioned are as always, each by its own statistics.

Values, or how often each class or token occurs.
"""

import dataclasses
import math
from typing import Final

from lightning_spike.diagnosis.observations.reference_range import SeriesRange, reference_range
from lightning_spike.diagnosis.view import EpisodeView

FAR: Final = 0.25
"""Part of the range's width by which a statistic of classes must lie beyond it: of 128 values the next one that lies
above all lies further with a probability of under a per cent."""
MIXED: Final = ("entropy", "distinct")
"""Statistics that tell what kinds of class or token a batch is made of."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unusual:
    """A statistic of one leaf that is not as always."""

    signal: str
    statistic: str
    observed: float
    usual: float
    ratio: float
    """By how much, as a factor of at least 1."""
    text: str


def input_known(view: EpisodeView) -> bool:
    """Whether anything at all is known of the inputs of the batch at the onset."""
    leaves = (*view.leaves("std"), *class_leaves(view, "input"))
    return any(
        view.at_onset(f"batch/{leaf}/{name}") is not None
        for leaf in leaves
        if leaf.startswith("input")
        for name in ("std", "entropy")
    )


def unusual_input(view: EpisodeView) -> Unusual | None:
    """What is most out of the ordinary about the inputs of the questioned batches; `None` where nothing is."""
    return _most([*_values(view, "input"), *_classes(view, "input")])


def unusual_target(view: EpisodeView) -> Unusual | None:
    """The same of the targets."""
    return _most([*_values(view, "target"), *_classes(view, "target")])


def class_leaves(view: EpisodeView, part: str) -> tuple[str, ...]:
    """The integer leaves of one part whose classes were counted."""
    tail = "/entropy"
    names = [s for s in view.store.history.signals if s.startswith(f"batch/{part}") and s.endswith(tail)]
    return tuple(name.removeprefix("batch/").removesuffix(tail) for name in names)


def _most(found: list[Unusual]) -> Unusual | None:
    return max(found, key=lambda u: u.ratio, default=None)


def _values(view: EpisodeView, part: str) -> list[Unusual]:
    odd = [o for at in view.suspect_batches for o in view.oddities(at) if o.leaf.split(".")[0] == part]
    return [
        Unusual(
            signal=o.signal,
            statistic=o.statistic,
            observed=o.excess.observed,
            usual=o.excess.expected,
            ratio=o.excess.ratio,
            text=f"{o.statistic} of '{o.leaf}' in the batch at step {view.step_of(o.excess.ordinal)} is {o.excess.observed:.3g}, usually {o.excess.expected:.3g}.",
        )
        for o in odd
    ]


def _classes(view: EpisodeView, part: str) -> list[Unusual]:
    first, last = min(view.suspect_batches), max(view.suspect_batches)
    told = [
        (leaf, name, c)
        for leaf in class_leaves(view, part)
        for name in MIXED
        if (c := reference_range(view, f"batch/{leaf}/{name}", first, last)) is not None
    ]
    return [u for leaf, name, c in told if (u := _class(view, leaf, name, c)) is not None]


def _class(view: EpisodeView, leaf: str, name: str, told: SeriesRange) -> Unusual | None:
    slack = FAR * (told.high - told.low)
    out = [v for v in told.values.tolist() if v > told.high + slack or v < told.low - slack]
    if not out:
        return None
    value = max(out, key=lambda v: abs(v - told.middle))
    effective = (math.exp(value), math.exp(told.middle)) if name == "entropy" else (value, told.middle)
    low, high = sorted(effective)
    return Unusual(
        signal=told.signal,
        statistic=name,
        observed=value,
        usual=told.middle,
        ratio=high / low if low > 0.0 else math.inf,
        text=f"{'The entropy of' if name == 'entropy' else 'The number of kinds in'} '{leaf}' at step {view.step} is {value:.3g}, usually {told.middle:.3g}.",
    )
