"""The record of a cause: its observers, premises, summary and fixes.

A cause is one file in `causes/`: a docstring, its observers, and `CAUSE = Cause(...)`. Another package offers one under
an entry point of the group `lightning_spike.causes`. Catalogue, ranking, report, tables, tests and benchmark find it
without registration.
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
"""Kinds of episode in which the training loss rose."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fix:
    """One thing to change."""

    text: str
    """For a person, with a value from this run."""
    change: Change | None = None
    """For a program, where the fix is one setting."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One cause of loss spikes and similar episodes.

    It has no state. Its functions take an `EpisodeView`, in which any signal may be missing or not finite.
    """

    id: str
    """As in report.json."""
    family: Family
    title: str
    """A few words for a heading."""
    meaning: str
    """One line for the table of causes."""
    observations: tuple[Observer, ...]
    """Evidence for and against it; the weight of each level stands in `weights.json`."""
    summary: Callable[[EpisodeView], str]
    """One sentence with the numbers: what happened if this is the cause."""
    fixes: Callable[[EpisodeView], tuple[Fix, ...]]
    """What to change, most effective first; the first fix's `change` is the verdict's."""
    requires: tuple[Observer, ...] = ()
    """Premises. One that does not hold gives an observation, which is then the only evidence about the cause."""
    applies_to: frozenset[EpisodeKind] = LOSS_ROSE
    explains: frozenset[str] = frozenset()
    """Ids of the causes that are its symptoms, beside those of its family (`weigh.SYMPTOMS_OF`): its evidence is
    subtracted from theirs (explaining away)."""
    tested_by: frozenset[Group] = frozenset()
    """Groups whose shares of the jump test this cause in replay (`judgement.jump_shares`); empty where none does."""
    sufficient_findings: frozenset[tuple[str, str]] = frozenset()
    """Findings, as (detector, kind), that show the cause without an episode: checks with nearly no false alarms."""
    shown: Callable[[TrainerStateStore], Shown | None] | None = None
    """Where the cause is visible in a run without a severe episode; by default at its first sufficient finding."""
    prior: float = 1.0
    """How common it is relative to the other causes, before any evidence."""
    weights: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """Weights by observer and level for a cause of another package, which `weights.json` does not list."""
