"""What a cause is: the base of everything in `causes/`, and what its examination of a case gives."""

import abc
import dataclasses
from typing import ClassVar

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.observations.quiet import Shown
from lightning_spike.records import Change, EpisodeKind, Evidence, Family
from lightning_spike.store import TrainerStateStore

LOSS_ROSE = frozenset({EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE, EpisodeKind.OSCILLATION})
"""The kinds of episode in which the training loss went up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What one cause has to say about one case."""

    evidence: tuple[Evidence, ...] = ()
    """For and against, each with its weight; a cause without a word in its favour is not listed."""
    summary: str = ""
    """One sentence with the numbers in it, for the case that this is the cause."""
    fixes: tuple[str, ...] = ()
    """What to change, most effective first, with values from this run."""
    change: Change | None = None
    """The first of them, as a program can apply it."""
    confirmed: bool | None = None
    """What the lab's replay says; `None` where it said nothing."""

    @property
    def total(self) -> float:
        """Sum of the log likelihood ratios."""
        return sum(item.weight for item in self.evidence)

    @property
    def speaks(self) -> bool:
        """Whether anything at all speaks for the cause."""
        return any(item.weight > 0.0 for item in self.evidence)


class Cause(abc.ABC):
    """One cause of trouble in a training run.

    To add one, write one file: a subclass of this in a module of its own, in `lightning_spike/diagnosis/causes/`, or in your own package under an entry
    point of the group `lightning_spike.causes`. Its docstring is what a reader gets to see of it: what it is, how it is seen, what speaks
    against it, why these thresholds, what to do. Everything that it needs to know it asks the `Case`; it keeps no state.
    """

    id: ClassVar[str]
    """As in report.json."""
    family: ClassVar[Family]
    title: ClassVar[str]
    """A few words for a heading."""
    applies_to: ClassVar[frozenset[EpisodeKind]] = LOSS_ROSE
    explains: ClassVar[frozenset[str]] = frozenset()
    """Ids of the causes that this one brings about as its symptoms: what speaks for it is taken off what speaks for them."""
    tested_by: ClassVar[frozenset[str]] = frozenset()
    """Whose share of the jump the lab's experiments must find for this to be the cause: of `"data"`, `"learning_rate"`, `"optimizer"`, `"clipping"`, `"numerics"`, `"computation"`, `"gradient"`, `"intrinsic"` (a
    step too long with everything as usual) and `"outside"`; the shares of several are added. Empty where no experiment tells."""
    standing: ClassVar[frozenset[tuple[str, str]]] = frozenset()
    """Findings, as (detector, kind), that show the cause by themselves, also in a run whose loss has shown nothing (yet): invariants with nearly no false alarms."""
    prior: ClassVar[float] = 1.0
    """How common it is beside the others, before anything is known."""

    @abc.abstractmethod
    def examine(self, case: Case) -> Examination:
        """Weigh up one episode; must bear any signal to be missing or not finite, and changes nothing."""

    def shown(self, store: TrainerStateStore) -> Shown | None:
        """Where the cause shows itself in a run without an episode of any weight; by default the first of its `standing` findings.

        Pure. Must have nearly no false alarms: nothing else speaks for trouble there.
        """
        found = [f.at for f in store.findings if (f.detector, f.kind) in self.standing]
        return Shown(at=min(found, key=lambda at: at.ordinal)) if found else None
