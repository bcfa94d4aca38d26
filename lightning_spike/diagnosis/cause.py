"""What a cause is: a record of what is observed, what it requires, how it is summed up and what fixes it.

A cause is one file in `causes/`: a docstring, its observers, and `CAUSE = Cause(...)`. Another package offers one under
an entry point of the group `lightning_spike.causes`. Catalogue, ranking, report, tables, tests and benchmark find it by
themselves.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observer
from lightning_spike.diagnosis.observations.loss_rise import Shown
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family
from lightning_spike.store import TrainerStateStore

LOSS_ROSE = frozenset({EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE, EpisodeKind.OSCILLATION})
"""The kinds of episode in which the training loss went up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fix:
    """One thing to change."""

    text: str
    """For a person, with a value worked out from the run."""
    change: Change | None = None
    """For a program, where it is one setting."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One cause of trouble in a training run.

    It keeps no state; every function of it takes an `EpisodeView` and must bear any signal to be missing or not finite.
    """

    id: str
    """As in report.json."""
    family: Family
    title: str
    """A few words for a heading."""
    meaning: str
    """One line for the table of causes."""
    observations: tuple[Observer, ...]
    """What is looked at, in the order of telling; each level weighs what `weights.json` says."""
    summary: Callable[[EpisodeView], str]
    """One sentence with the numbers in it, for the case that this is the cause."""
    fixes: Callable[[EpisodeView], tuple[Fix, ...]]
    """What to change, most effective first; the first fix's `change` is the verdict's."""
    requires: tuple[Observer, ...] = ()
    """Premises: each gives an observation where its premise does not hold, and then that is all that is said of the
    cause."""
    applies_to: frozenset[EpisodeKind] = LOSS_ROSE
    explains: frozenset[str] = frozenset()
    """Ids of the causes that this one brings about as symptoms, beside those of its family (`families`): its evidence
    is subtracted from theirs (explaining away)."""
    tested_by: frozenset[Group] = frozenset()
    """The groups whose shares of the jump, added up, test this cause in replay (`judgement.jump_shares`); empty where
    no replay tests it."""
    sufficient_findings: frozenset[tuple[str, str]] = frozenset()
    """Findings, as (detector, kind), that show the cause without an episode: invariants with nearly no false alarms."""
    shown: Callable[[TrainerStateStore], Shown | None] | None = None
    """Where the cause shows itself in a run without a severe episode; by default the first of its
    `sufficient_findings`."""
    prior: float = 1.0
    """How common it is beside the others, before anything is known."""
    weights: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """Weights by observer and level, for a cause that `weights.json` does not list, as one of another package."""
