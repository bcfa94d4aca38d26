"""Ranks the causes of every episode, and over the run.

Every cause is examined for every episode (`examine`), the evidence becomes probabilities (`weigh`), and these are
averaged over the episodes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from lightning_spike.diagnosis.batch_ranges import AFTERSHOCK
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.examine import by_weight, examine, examine_all
from lightning_spike.diagnosis.observations.loss_rise import Rise, Shown
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.diagnosis.weigh import Examined, probabilities
from lightning_spike.diagnosis.weights import Weights, fitted
from lightning_spike.records import Episode, EpisodeKind, Family, Moment, Recovery, Verdict
from lightning_spike.store import TrainerStateStore

MAX_EPISODES_WITH_FIXES: Final = 4
"""Episodes whose first fixes are listed in the verdict over the run; engineering choice."""
MIN_PROBABILITY: Final = 0.02
"""Probability below which a verdict is left out; engineering choice."""
QUIET: Final = 0
"""Id that stands for a run whose loss shows nothing; episodes of the report begin at 1, by definition."""
QUIET_SEVERITY: Final = 5.0
"""Severity of such a run: that of a spike at the detection limit; engineering choice."""
MAX_SEVERITY: Final = 99.0
"""Cap of an episode's severity, as in `Episode.severity`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The ranked causes of a run."""

    per_episode: Mapping[int, tuple[Verdict, ...]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """By episode id, most probable first; their sum is at most 1, the rest is "unexplained". Every episode has an
    entry, which may be empty."""
    overall: tuple[Verdict, ...] = ()
    """Over the run: the mean over the episodes, weighted by severity. Empty for a healthy run."""
    remarks: tuple[str, ...] = ()
    """What could not be examined, and why: episodes without replay, and causes that raised."""


def diagnose(
    store: TrainerStateStore, causes: Iterable[Cause] | None = None, weights: Weights | None = None
) -> Diagnosis:
    """Rank the causes of every episode, and over the run.

    Pure: the store is only read. Takes some milliseconds an episode.

    Args:
        store: The run, finished or not.
        causes: The causes to choose from; those of the catalogue by default.
        weights: The fitted model; that of the package by default.
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
    """The diagnosis of a run whose loss shows nothing: an episode made up for it, and its verdicts.

    Based on findings that are sufficient for a cause. Empty if a severe episode exists. Findings from 12 batches before
    the first onset on are ignored: they may be effects of that episode.
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
    """A rise that is too small or too slow for an episode, as one."""
    quiet, recovery = _quiet(rise.begun), Recovery.NEVER if rise.end is None else Recovery.WHOLE
    return dataclasses.replace(
        quiet, kind=EpisodeKind.DIVERGENCE, noticed=rise.peak_at, peak=rise.peak_at, end=rise.end,
        loss_before=rise.before, loss_peak=rise.peak, recovery=recovery,
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
    """One remark per reason of the lab, with its episodes."""
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
    """Probabilities in the earlier episode that may go on in this one."""
    if view.previous is None:
        return {}
    return {v.cause: v.probability for v in earlier.get(view.previous.id, ())}


def _verdict(found: Examined, probability: float, view: EpisodeView, remarks: list[str]) -> Verdict | None:
    """The verdict on one cause; `None` where its summary or fixes raised, which `remarks` then says."""
    try:
        summary, fixes = found.cause.summary(view), found.cause.fixes(view)
    except Exception as error:  # noqa: BLE001 - as in `examine`
        remarks.append(f"The cause {found.cause.id} could not be put into words: {type(error).__name__}: {error}")
        return None
    return Verdict(
        cause=found.cause.id, family=found.cause.family, probability=probability, episodes=(view.episode.id,),
        summary=summary, evidence=by_weight(found.evidence), fixes=tuple(fix.text for fix in fixes),
        change=fixes[0].change if fixes else None, confirmed=found.confirmed,
    )  # fmt: skip


def _over_run(episodes: Sequence[Episode], per_episode: Mapping[int, tuple[Verdict, ...]]) -> tuple[Verdict, ...]:
    severities = {e.id: e.severity if math.isfinite(e.severity) else MAX_SEVERITY for e in episodes}
    weights = {episode: min(max(severity, 1.0), MAX_SEVERITY) for episode, severity in severities.items()}
    whole = sum(weights.values())
    by_cause = sorted(itertools.chain.from_iterable(per_episode.values()), key=lambda v: v.cause)
    joined = [_joined(list(group), weights, whole) for _, group in itertools.groupby(by_cause, key=lambda v: v.cause)]
    listed = [v for v in joined if v.probability >= MIN_PROBABILITY]
    return tuple(sorted(listed, key=lambda v: (-v.probability, v.cause)))


def _fixes(verdicts: Sequence[Verdict], clearest: Verdict) -> tuple[str, ...]:
    """The first fix of every episode, as each has its own data to correct, then the other fixes of the clearest."""
    ordered = sorted((v for v in verdicts if v.fixes), key=lambda v: v.episodes[0])
    own = tuple(dict.fromkeys(v.fixes[0] for v in ordered))
    more = len(own) - MAX_EPISODES_WITH_FIXES
    episodes = "one more episode" if more == 1 else f"{more} more episodes"
    others = (f"The same for {episodes}.",) if more > 0 else ()
    return (*own[:MAX_EPISODES_WITH_FIXES], *others, *clearest.fixes[1:])


def _joined(verdicts: Sequence[Verdict], weights: Mapping[int, float], whole: float) -> Verdict:
    """The verdict on one cause over the run, in the words of its clearest episode."""
    clearest = max(verdicts, key=lambda v: v.probability * weights[v.episodes[0]])
    fixes = _fixes(verdicts, clearest) if clearest.family is Family.DATA else clearest.fixes
    answers = {v.confirmed for v in verdicts} - {None}
    probability = sum(v.probability * weights[v.episodes[0]] for v in verdicts) / whole
    episodes = tuple(sorted(v.episodes[0] for v in verdicts if v.episodes[0] != QUIET))
    confirmed = True if True in answers else next(iter(answers), None)
    return dataclasses.replace(clearest, probability=probability, episodes=episodes, fixes=fixes, confirmed=confirmed)
