"""What is known of a change from outside the training step.

Which writes were seen, and what the lab found to be changed.
"""

import sys
from typing import Final

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import OutsideChange
from lightning_spike.records import EpisodeKind, Finding

SUDDEN: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Kinds of episode of which nothing after the peak can be the cause; the onset of the others is known less well, and
they last."""


def outside_change(view: EpisodeView) -> OutsideChange | None:
    """What the lab found of a change from outside; `None` where it found none, or was not there."""
    return None if view.experiments is None else view.experiments.outside_change


def changed_weights(change: OutsideChange) -> tuple[int, int, int]:
    """Of the weights that differ.

    Elements that changed, elements in all, and changed elements that differ by a power of two, as after a flipped bit.
    """
    weights = [d for d in change.different if d.kind == "weights"]
    return sum(d.changed for d in weights), sum(d.elements for d in weights), sum(d.powers_of_two for d in weights)


def earlier(view: EpisodeView, detector: str, kind: str) -> Finding | None:
    """The last finding of this kind that may have brought the episode about.

    Not after its peak, of a slow one not after its end.
    """
    found = view.findings(detector, kind, first=0, last=last_possible(view))
    return found[-1] if found else None


def last_that_matters(view: EpisodeView, detector: str, kind: str) -> Finding | None:
    """The same of a detector that looks now and then.

    What it found may have been so since just after its `last_equal`, since the start where it has none.
    """
    ever = view.findings(detector, kind, first=0, last=sys.maxsize)
    found = [f for f in ever if (f.number("last_equal") or 0) < max(last_possible(view), 1)]
    return found[-1] if found else None


def last_possible(view: EpisodeView) -> int:
    """Ordinal of the last batch that can have brought the episode about."""
    return max(view.onset, view.episode.peak.ordinal) if view.kind in SUDDEN else view.last


def last_write(view: EpisodeView, what: str) -> tuple[Finding, bool] | None:
    """The last write into `"weights"` or `"optimizer_state"` that was seen before the episode, and whether a validation lay in between; such a one only where there is no other."""
    for kind, validated in ((what, False), (f"{what}_at_validation", True)):
        if (finding := earlier(view, "outside_writes", kind)) is not None:
            return finding, validated
    return None
