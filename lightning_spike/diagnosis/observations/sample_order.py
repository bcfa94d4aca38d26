"""Whether the batches around an episode came one-sided.

With targets less mixed than those of any batch of long before.
"""

from typing import Final

from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.observations.batch_parts import class_leaves
from lightning_spike.diagnosis.observations.reference_range import GAP, Stretch, longest, parts, reference_range
from lightning_spike.diagnosis.view import EpisodeView

SEVERAL: Final = 3
"""Batches in a row whose targets are less mixed than those of any batch of long before: of 128, that many in a row come
by chance once in two million."""


def targets_known(view: EpisodeView) -> bool:
    """Whether it was recorded how mixed the targets are."""
    return any(reference_range(view, signal, view.onset - GAP, view.onset) is not None for signal in _signals(view))


def _signals(view: EpisodeView) -> tuple[str, ...]:
    """How mixed the targets of a batch are: by class, or by number."""
    classes = [f"batch/{leaf}/entropy" for leaf in class_leaves(view, "target")]
    return (*classes, *(f"batch/{leaf}/std" for leaf in parts(view, "target", "std")))


def one_sided(view: EpisodeView) -> tuple[str, Stretch] | None:
    """The longest stretch of batches that are less mixed than ever before, which the onset is in, or at most a few batches behind."""
    found = [
        (signal, stretch)
        for signal in _signals(view)
        if (told := reference_range(view, signal, view.onset - GAP, max(view.onset, view.episode.peak.ordinal)))
        is not None
        and (stretch := longest(s for s in told.stretches(above=False) if s.first <= view.onset + GUARD)) is not None
    ]
    best = max(found, key=lambda pair: pair[1].count, default=None)
    return best if best is not None and best[1].count >= SEVERAL else None
