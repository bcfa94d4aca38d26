"""Whether the batches around an episode are one-sided: their targets less mixed than in any earlier batch."""

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.batch_parts import class_leaves
from lightning_spike.diagnosis.observations.reference_range import (
    MIN_STRETCH_BATCHES,
    RECENT_BATCHES,
    Stretch,
    longest,
    parts,
    reference_range,
)
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView


def targets_known(view: EpisodeView) -> bool:
    """Whether it was recorded how mixed the targets are."""
    first = view.onset - RECENT_BATCHES
    return any(reference_range(view, signal, first, view.onset) is not None for signal in _signals(view))


def _signals(view: EpisodeView) -> tuple[str, ...]:
    """The series that say how mixed the targets of a batch are: entropy of classes, spread of numbers."""
    classes = [f"batch/{leaf}/entropy" for leaf in class_leaves(view, "target")]
    return (*classes, *(f"batch/{leaf}/std" for leaf in parts(view, "target", "std")))


def one_sided(view: EpisodeView) -> tuple[str, Stretch] | None:
    """The longest stretch of batches less mixed than any before, at the onset or just before it; else `None`."""
    first, last = view.onset - RECENT_BATCHES, max(view.onset, view.episode.peak.ordinal)
    found = []
    for signal in _signals(view):
        series = reference_range(view, signal, first, last)
        stretches = () if series is None else series.stretches(above=False)
        stretch = longest(s for s in stretches if s.first <= view.onset + GUARD)
        found += [] if stretch is None else [(signal, stretch)]
    best = max(found, key=lambda pair: pair[1].count, default=None)
    return best if best is not None and best[1].count >= MIN_STRETCH_BATCHES else None


@observer("one-sided")
def sorted_samples(view: EpisodeView) -> Observation | None:
    """Targets less mixed than ever: sorted samples move the inputs as well, and their labels are right."""
    found = view.once(one_sided)
    if found is None:
        return None
    signal, stretch = found
    text = f"The targets are less mixed than ever in {batches(stretch.count)} in a row: the samples came sorted."
    return Observation(text, signal=signal, observed=stretch.furthest, expected=stretch.usual)
