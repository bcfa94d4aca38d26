"""Store in, ranked causes out.

Every cause examines every episode, the answers are weighed up (`weigh`), and the episodes are put together over the
run.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.constants import AFTERSHOCK
from lightning_spike.diagnosis.examine import by_weight, examine, examine_all
from lightning_spike.diagnosis.observations.loss_rise import Rise, Shown
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.diagnosis.weigh import Examined, probabilities
from lightning_spike.diagnosis.weights import Weights, fitted
from lightning_spike.records import Episode, EpisodeKind, Family, Moment, Recovery, Verdict
from lightning_spike.store import TrainerStateStore

MAX_EPISODES_WITH_FIXES: Final = 4
"""Episodes whose data are named in the verdict over the run; engineering choice."""
MIN_PROBABILITY: Final = 0.02
"""Verdicts below are left out; engineering choice."""
QUIET: Final = 0
"""Id of the stretch in which a cause shows itself and the loss shows nothing; it is no episode of the report."""
QUIET_SEVERITY: Final = 5.0
"""Its severity: that of a spike at the limit of what is noticed."""
MAX_SEVERITY: Final = 99.0
"""Cap of an episode's severity, as in `Episode.severity`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The ranked causes of a run."""

    per_episode: Mapping[int, tuple[Verdict, ...]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """By episode id, most probable first; their sum is at most 1, the rest is "unexplained". Every episode has an
    entry, which may be empty."""
    overall: tuple[Verdict, ...] = ()
    """Over the run: the mean over the episodes, each weighing as much as it is severe. Empty on a healthy run."""
    remarks: tuple[str, ...] = ()
    """What could not be examined, and why: episodes that were not run again, and broken causes (one of another package
    costs that cause and not the report)."""


def diagnose(
    store: TrainerStateStore, causes: Iterable[Cause] | None = None, weights: Weights | None = None
) -> Diagnosis:
    """Rank the causes of every episode, and over the run.

    Pure: the store is only read, and the same store gives the same answer. Takes some milliseconds an episode.

    Args:
        store: The run, finished or not.
        causes: The causes to choose from; all of the catalogue by default.
        weights: What each level weighs; those of the package by default.
    """
    known = tuple(catalogue() if causes is None else causes)
    numbers = fitted() if weights is None else weights
    remarks = _not_replayed_remarks(store)
    per_episode: dict[int, tuple[Verdict, ...]] = {}
    for episode in store.episodes:
        view = EpisodeView(store, episode)
        found = examine_all(view, known, numbers, remarks)
        per_episode[episode.id] = _verdicts(found, view, _inherited(view, per_episode), numbers, remarks)
    quiet, of_quiet = _without_episode(store, known, remarks, numbers)
    overall = _over_run((*store.episodes, *quiet), {**per_episode, QUIET: of_quiet})
    return Diagnosis(per_episode=MappingProxyType(per_episode), overall=overall, remarks=tuple(dict.fromkeys(remarks)))


def _without_episode(
    store: TrainerStateStore, causes: Sequence[Cause], remarks: list[str], weights: Weights
) -> tuple[tuple[Episode, ...], tuple[Verdict, ...]]:
    """What is wrong in a run before its loss shows anything, by the findings that are sufficient for a cause.

    As an episode of its own, and its verdicts.

    Ignored if a severe episode exists, or from 12 batches before the first onset on: what comes later may be the trace
    of that episode.
    """
    if any(not e.severity < QUIET_SEVERITY for e in store.episodes):
        return (), ()
    first_onset = min((e.onset.ordinal - AFTERSHOCK // 2 for e in store.episodes), default=math.inf)
    shown = {c.id: s for c in causes if (s := _shown(c, store, remarks)) is not None and s.at.ordinal < first_onset}
    if not shown:
        return (), ()
    rises = [s.rise for s in shown.values() if s.rise is not None]
    rise = max(rises, key=lambda r: r.peak / r.before, default=None)
    at = min((s.at for s in shown.values()), key=lambda moment: moment.ordinal)
    view = EpisodeView(store, _quiet(at) if rise is None else _risen(rise))
    asked = [c for c in causes if c.id in shown or (rise is not None and view.kind in c.applies_to)]
    found = [e for cause in asked if (e := examine(cause, view, weights, remarks)) is not None]
    verdicts = _verdicts(found, view, {}, weights, remarks)
    return ((view.episode,) if verdicts else ()), verdicts


def _quiet(at: Moment) -> Episode:
    return Episode(id=QUIET, kind=EpisodeKind.STALL, onset=at, noticed=at, peak=at, severity=QUIET_SEVERITY)


def _risen(rise: Rise) -> Episode:
    """A rise that is no episode, for it was too small or too slow, as if it were one."""
    return Episode(
        id=QUIET, kind=EpisodeKind.DIVERGENCE, onset=rise.begun, noticed=rise.peak_at, peak=rise.peak_at, severity=QUIET_SEVERITY,
        loss_before=rise.before, loss_peak=rise.peak, end=rise.end, recovery=Recovery.NEVER if rise.end is None else Recovery.WHOLE,
    )  # fmt: skip


def _shown(cause: Cause, store: TrainerStateStore, remarks: list[str]) -> Shown | None:
    try:
        return _first_finding(cause, store) if cause.shown is None else cause.shown(store)
    except Exception as error:  # noqa: BLE001 - as in `examine`
        remarks.append(f"The cause {cause.id} could not be looked for: {type(error).__name__}: {error}")
        return None


def _first_finding(cause: Cause, store: TrainerStateStore) -> Shown | None:
    """The first finding that is sufficient for the cause."""
    found = [f.at for f in store.findings if (f.detector, f.kind) in cause.sufficient_findings]
    return Shown(at=min(found, key=lambda at: at.ordinal)) if found else None


def _not_replayed_remarks(store: TrainerStateStore) -> list[str]:
    """The lab's reasons, each with the episodes that it held for."""
    reasons: dict[str, list[int]] = {}
    for episode, why in not_replayed(store).items():
        reasons.setdefault(why, []).append(episode)
    return [f"{_episodes(ids)} could not be replayed: {why}." for why, ids in reasons.items()]


def not_replayed(store: TrainerStateStore) -> dict[int, str]:
    """Why the lab did not replay an episode, by its id."""
    return {episode: found.not_run for episode, found in store.experiments.items() if found.not_run is not None}


def _episodes(ids: Sequence[int]) -> str:
    return f"Episode{'s' if len(ids) > 1 else ''} {', '.join(map(str, sorted(ids)))}"


def _verdicts(
    found: Sequence[Examined], view: EpisodeView, inherited: Mapping[str, float], weights: Weights, remarks: list[str]
) -> tuple[Verdict, ...]:
    by_name = probabilities(found, inherited, weights)
    listed = [e for e in found if e.supported and by_name[e.cause.id] >= MIN_PROBABILITY]
    verdicts = [v for e in listed if (v := _verdict(e, by_name[e.cause.id], view, remarks)) is not None]
    return tuple(sorted(verdicts, key=lambda v: (-v.probability, v.cause)))


def _inherited(view: EpisodeView, earlier: Mapping[int, tuple[Verdict, ...]]) -> Mapping[str, float]:
    """The verdict on the episode of which this one may be the rest: half of the prior."""
    if view.previous is None:
        return {}
    return {v.cause: v.probability for v in earlier.get(view.previous.id, ())}


def _verdict(found: Examined, probability: float, view: EpisodeView, remarks: list[str]) -> Verdict | None:
    """The verdict on one cause; `None` where its summary or fixes break, which `remarks` then names."""
    try:
        summary, fixes = found.cause.summary(view), found.cause.fixes(view)
    except Exception as error:  # noqa: BLE001 - as in `examine`
        remarks.append(f"The cause {found.cause.id} could not be put into words: {type(error).__name__}: {error}")
        return None
    return Verdict(
        cause=found.cause.id,
        family=found.cause.family,
        probability=probability,
        episodes=(view.episode.id,),
        summary=summary,
        evidence=by_weight(found.evidence),
        fixes=tuple(fix.text for fix in fixes),
        change=fixes[0].change if fixes else None,
        confirmed=found.confirmed,
    )


def _over_run(episodes: Sequence[Episode], per_episode: Mapping[int, tuple[Verdict, ...]]) -> tuple[Verdict, ...]:
    weights = {
        e.id: min(max(e.severity, 1.0), MAX_SEVERITY) if math.isfinite(e.severity) else MAX_SEVERITY for e in episodes
    }
    whole = sum(weights.values())
    by_cause = sorted(itertools.chain.from_iterable(per_episode.values()), key=lambda v: v.cause)
    joined = [_joined(list(group), weights, whole) for _, group in itertools.groupby(by_cause, key=lambda v: v.cause)]
    listed = [v for v in joined if v.probability >= MIN_PROBABILITY]
    return tuple(sorted(listed, key=lambda v: (-v.probability, v.cause)))


def _fixes(verdicts: Sequence[Verdict], clearest: Verdict) -> tuple[str, ...]:
    """Each episode has data of its own to mend, so the first fix of every one is told.

    The rest is that of the clearest.
    """
    ordered = sorted((v for v in verdicts if v.fixes), key=lambda v: v.episodes[0])
    own = tuple(dict.fromkeys(v.fixes[0] for v in ordered))
    more = (
        (f"The same for {len(own) - MAX_EPISODES_WITH_FIXES} more episodes.",)
        if len(own) > MAX_EPISODES_WITH_FIXES
        else ()
    )
    return (*own[:MAX_EPISODES_WITH_FIXES], *more, *clearest.fixes[1:])


def _joined(verdicts: Sequence[Verdict], weights: Mapping[int, float], whole: float) -> Verdict:
    """One cause over the run: told by the episode in which it has most to say."""
    clearest = max(verdicts, key=lambda v: v.probability * weights[v.episodes[0]])
    fixes = _fixes(verdicts, clearest) if clearest.family is Family.DATA else clearest.fixes
    answers = {v.confirmed for v in verdicts} - {None}
    return dataclasses.replace(
        clearest,
        probability=sum(v.probability * weights[v.episodes[0]] for v in verdicts) / whole,
        episodes=tuple(sorted(v.episodes[0] for v in verdicts if v.episodes[0] != QUIET)),
        fixes=fixes,
        confirmed=True if True in answers else next(iter(answers), None),
    )
