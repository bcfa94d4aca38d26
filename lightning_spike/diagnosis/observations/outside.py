"""What is known of a change from outside of the training step: who was seen writing, and what the lab found to be changed."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.records import EpisodeKind, Finding

SUDDEN: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Kinds of episode of which nothing after the peak can be the cause; the onset of the others is known less well, and they last."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutsideChange:
    """The lab ran the moment again, and the loss came out as it should have been."""

    changed: str | None
    """`"weights"`, `"optimizer"`, `"gradient"`, `"momentum_or_gradient"`, `"nothing"` where weights and state were the same up to that very batch, `None` where it is not known."""
    seen: frozenset[str]
    """What somebody was seen to write into: `"weights"`, `"optimizer"`."""
    repaired: float | None
    """Share of the jump that is gone in the re-run."""
    elements: int
    """Elements of the weights in question that are others, as far as they were counted; 0 where they were not."""
    of: int
    """… of so many."""
    powers_of_two: int
    """… of which so many are a power of two times what they were, as after the flip of a bit of the exponent or the sign."""
    text: str

    @property
    def share(self) -> float | None:
        """Share of the elements that are others; `None` where they were not counted."""
        return self.elements / self.of if self.of else None


def outside_change(case: Case) -> OutsideChange | None:
    """What the lab says of a change from outside; `None` where it found none, or was not there."""
    told = case.lab("outside")
    if told is None:
        return None
    weights = [d for d in _items(told.get("different")) if d.get("kind") == "weights"]
    counts = [(_whole(d.get("changed")), _whole(d.get("elements")), _whole(d.get("powers_of_two"))) for d in weights]
    changed, text = told.get("changed"), told.get("text")
    return OutsideChange(
        changed=changed if isinstance(changed, str) else None,
        seen=frozenset(str(write.get("kind")) for write in _items(told.get("writes"))),
        repaired=number(told.get("repaired")),
        elements=sum(c for c, _, _ in counts),
        of=sum(n for _, n, _ in counts),
        powers_of_two=sum(p for _, _, p in counts),
        text=text if isinstance(text, str) else "Run again, the loss is as it should have been.",
    )


def earlier(case: Case, detector: str, kind: str) -> Finding | None:
    """The last finding of this kind that may have brought the episode about: not after its peak, of a slow one not after its end."""
    found = case.findings(detector, kind, first=0, last=_until(case))
    return found[-1] if found else None


def last_that_matters(case: Case, detector: str, kind: str) -> Finding | None:
    """The same of a detector that looks now and then: what it found may have been so since just after its `last_equal`, since the start where it has none."""
    ever = case.findings(detector, kind, first=0, last=sys.maxsize)
    found = [f for f in ever if (number(f.detail.get("last_equal")) or 0) < max(_until(case), 1)]
    return found[-1] if found else None


def _until(case: Case) -> int:
    return max(case.onset, case.episode.peak.ordinal) if case.kind in SUDDEN else case.last


def last_write(case: Case, what: str) -> tuple[Finding, bool] | None:
    """The last write into `"weights"` or `"optimizer_state"` that was seen before the episode, and whether a validation lay in between; such a one only where there is no other."""
    for kind, validated in ((what, False), (f"{what}_at_validation", True)):
        if (finding := earlier(case, "outside_writes", kind)) is not None:
            return finding, validated
    return None


def _items(value: object) -> Sequence[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
