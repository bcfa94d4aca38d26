"""Changes from outside the training step: the writes that were seen, and what the lab found to be changed."""

import sys
from typing import Final

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import OutsideChange
from lightning_spike.records import EpisodeKind, Finding

SUDDEN: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Kinds of episode that nothing after the peak can have caused. The onset of the others is known less well."""
SHOWS_WITHIN: Final = 2
"""Batches from a write into weights or state to the first loss that shows it: one, or two where it was small;
engineering choice."""
WHOLE_TENSOR_SHARE: Final = 0.25
"""Share of changed elements above which code wrote whole tensors; a memory error changes single elements;
engineering choice."""
MAX_NAMES: Final = 3
"""Names of parameters in one sentence; engineering choice."""
WATCHED: Final = ("update_rms", "momentum_cosine", "update_norm", "update_norm/none")
"""Signals of which at least one is recorded where the training step is watched."""


def is_watched(view: EpisodeView) -> bool:
    """Whether the optimizer and the writes outside its step were watched in this run."""
    return any(signal in view.store.history.signals for signal in WATCHED)


def changed_weights(change: OutsideChange) -> tuple[int, int, int]:
    """Changed elements of the weights that differ, all their elements, and those changed by a power of two (a bit)."""
    weights = [d for d in change.different if d.kind == "weights"]
    return sum(d.changed for d in weights), sum(d.elements for d in weights), sum(d.powers_of_two for d in weights)


def earlier(view: EpisodeView, detector: str, kind: str) -> Finding | None:
    """The last finding of this kind that can have caused the episode."""
    found = view.findings(detector, kind, first=0, last=last_possible(view))
    return found[-1] if found else None


def last_that_matters(view: EpisodeView, detector: str, kind: str) -> Finding | None:
    """The last finding of a detector that looks only now and then, if it can have caused the episode.

    What it found may be as old as the batch after its `last_equal`, or as the run where it has none.
    """
    ever = view.findings(detector, kind, first=0, last=sys.maxsize)
    found = [f for f in ever if (f.number("last_equal") or 0) < max(last_possible(view), 1)]
    return found[-1] if found else None


def last_possible(view: EpisodeView) -> int:
    """Ordinal of the last batch that can have caused the episode: the peak, of a slow one its end."""
    return max(view.onset, view.episode.peak.ordinal) if view.kind in SUDDEN else view.last


def last_write(view: EpisodeView, what: str) -> tuple[Finding, bool] | None:
    """The last write into `"weights"` or `"optimizer_state"` before the episode, and whether it was at a validation.

    A write at a validation counts only where there is no other.
    """
    for kind, validated in ((what, False), (f"{what}_at_validation", True)):
        if (finding := earlier(view, "outside_writes", kind)) is not None:
            return finding, validated
    return None


def named(found: Finding, otherwise: str) -> str:
    """The first parameter names of a finding as `` `a`, `b`, … ``, or other words where it has none."""
    names = found.names()
    shown = ", ".join(f"`{name}`" for name in names[:MAX_NAMES])
    return f"{shown}{', …' if len(names) > MAX_NAMES else ''}" or otherwise
