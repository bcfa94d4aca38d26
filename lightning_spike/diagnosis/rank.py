"""Store in, ranked causes out: every cause examines every episode, the answers are weighed up (`weigh`), and the episodes are put together over the run."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from lightning_spike.diagnosis.calibration import Calibration, fitted
from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.constants import AFTERSHOCK, LEAST_PROBABILITY
from lightning_spike.diagnosis.experiment import with_experiment
from lightning_spike.diagnosis.observations.quiet import Rise, Shown
from lightning_spike.diagnosis.weigh import Examined, probabilities
from lightning_spike.records import Episode, EpisodeKind, Family, Moment, Recovery, Verdict
from lightning_spike.store import TrainerStateStore

MOST_FIXES = 4
"""Episodes whose data are named in the verdict over the run."""
QUIET = 0
"""Id of the stretch in which a cause shows itself and the loss shows nothing; it is no episode of the report."""
SHOWN = 5.0
"""Its severity: that of a spike at the limit of what is noticed."""
MOST_SEVERE = 99.0
"""Cap of an episode's severity, as in `Episode.severity`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The ranked causes of a run."""

    per_episode: Mapping[int, tuple[Verdict, ...]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """By episode id, most probable first; their sum is at most 1, the rest is "unexplained". Every episode has an entry, which may be empty."""
    overall: tuple[Verdict, ...] = ()
    """Over the run: the mean over the episodes, each weighing as much as it is severe. Empty on a healthy run."""
    remarks: tuple[str, ...] = ()
    """What could not be examined, and why: episodes that were not run again, and broken causes (one of another package costs that cause and not the report)."""


def diagnose(
    store: TrainerStateStore, causes: Iterable[Cause] | None = None, calibration: Calibration | None = None
) -> Diagnosis:
    """Rank the causes of every episode, and over the run.

    Pure: the store is only read, and the same store gives the same answer. Takes some milliseconds an episode.

    Args:
        store: The run, finished or not.
        causes: The causes to choose from; all of the catalogue by default.
        calibration: Between evidence and probability; that of the package by default.
    """
    known = tuple(catalogue() if causes is None else causes)
    numbers = fitted() if calibration is None else calibration
    remarks = _not_run_again(store)
    per_episode: dict[int, tuple[Verdict, ...]] = {}
    for episode in store.episodes:
        case = Case(store, episode)
        inherited = _inherited(case, per_episode)
        per_episode[episode.id] = _verdicts(examined(case, known, remarks), episode, inherited, numbers)
    quiet, by_themselves = _without_episode(store, known, remarks, numbers)
    overall = _over_run((*store.episodes, *quiet), {**per_episode, QUIET: by_themselves})
    return Diagnosis(per_episode=MappingProxyType(per_episode), overall=overall, remarks=tuple(dict.fromkeys(remarks)))


def _without_episode(
    store: TrainerStateStore, causes: Sequence[Cause], remarks: list[str], calibration: Calibration
) -> tuple[tuple[Episode, ...], tuple[Verdict, ...]]:
    """What is wrong in a run before its loss shows anything, by the findings that show a cause by themselves: as an episode of its own, and its verdicts.

    One that an episode came before may be the trace of that, one that an episode followed at once is weighed there, and beside an episode of any weight it has no say.
    """
    if any(not e.severity < SHOWN for e in store.episodes):
        return (), ()
    first_onset = min((e.onset.ordinal - AFTERSHOCK // 2 for e in store.episodes), default=math.inf)
    shown = {c.id: s for c in causes if (s := _shown(c, store, remarks)) is not None and s.at.ordinal < first_onset}
    if not shown:
        return (), ()
    rises = [s.rise for s in shown.values() if s.rise is not None]
    rise = max(rises, key=lambda r: r.peak / r.before, default=None)
    at = min((s.at for s in shown.values()), key=lambda moment: moment.ordinal)
    quiet = _quiet(at) if rise is None else _risen(rise)
    asked = [c for c in causes if c.id in shown or (rise is not None and quiet.kind in c.applies_to)]
    found = [e for cause in asked if (e := _examine(cause, Case(store, quiet), remarks)) is not None]
    verdicts = _verdicts(found, quiet, {}, calibration)
    return ((quiet,) if verdicts else ()), verdicts


def _quiet(at: Moment) -> Episode:
    return Episode(id=QUIET, kind=EpisodeKind.STALL, onset=at, noticed=at, peak=at, severity=SHOWN)


def _risen(rise: Rise) -> Episode:
    """A rise that is no episode, for it was too small or too slow, as if it were one."""
    return Episode(
        id=QUIET, kind=EpisodeKind.DIVERGENCE, onset=rise.begun, noticed=rise.peak_at, peak=rise.peak_at, severity=SHOWN,
        loss_before=rise.before, loss_peak=rise.peak, end=rise.end, recovery=Recovery.NEVER if rise.end is None else Recovery.WHOLE,
    )  # fmt: skip


def _shown(cause: Cause, store: TrainerStateStore, remarks: list[str]) -> Shown | None:
    try:
        return cause.shown(store)
    except Exception as error:  # noqa: BLE001 - as in `_examine`
        remarks.append(f"The cause {cause.id} could not be looked for: {type(error).__name__}: {error}")
        return None


def _not_run_again(store: TrainerStateStore) -> list[str]:
    """The lab's reasons, each with the episodes that it held for."""
    reasons: dict[str, list[int]] = {}
    for episode, why in not_run_again(store).items():
        reasons.setdefault(why, []).append(episode)
    return [f"{_episodes(ids)} could not be replayed: {why}." for why, ids in reasons.items()]


def not_run_again(store: TrainerStateStore) -> dict[int, str]:
    """Why the lab did not run an episode again, by its id."""
    found = [f.detail for f in store.findings if f.detector == "lab" and f.kind == "not_run"]
    return {
        d["episode"]: d["why"] for d in found if isinstance(d.get("episode"), int) and isinstance(d.get("why"), str)
    }


def _episodes(ids: Sequence[int]) -> str:
    return f"Episode{'s' if len(ids) > 1 else ''} {', '.join(map(str, sorted(ids)))}"


def examined(case: Case, causes: Iterable[Cause], remarks: list[str]) -> list[Examined]:
    """What every cause that applies to this kind of episode says of it; one that breaks is left out and named in `remarks`."""
    return [
        e for cause in causes if case.kind in cause.applies_to and (e := _examine(cause, case, remarks)) is not None
    ]


def _verdicts(
    found: Sequence[Examined], episode: Episode, inherited: Mapping[str, float], calibration: Calibration
) -> tuple[Verdict, ...]:
    by_name = probabilities(found, inherited, calibration)
    verdicts = [
        _verdict(e, by_name[e.cause.id], episode)
        for e in found
        if e.examination.speaks and by_name[e.cause.id] >= LEAST_PROBABILITY
    ]
    return tuple(sorted(verdicts, key=lambda v: (-v.probability, v.cause)))


def _examine(cause: Cause, case: Case, remarks: list[str]) -> Examined | None:
    try:
        examination = with_experiment(cause, case, cause.examine(case))
    except Exception as error:  # noqa: BLE001 - a cause may come from any package; its failure is reported, not hidden
        remarks.append(f"The cause {cause.id} could not be examined: {type(error).__name__}: {error}")
        return None
    return Examined(cause, examination) if math.isfinite(examination.total) else None


def _inherited(case: Case, earlier: Mapping[int, tuple[Verdict, ...]]) -> Mapping[str, float]:
    """What is known of the episode of which this one may be the rest: half of the prior is its verdict."""
    if case.previous is None:
        return {}
    return {v.cause: v.probability for v in earlier.get(case.previous.id, ())}


def _verdict(e: Examined, probability: float, episode: Episode) -> Verdict:
    told = sorted(e.examination.evidence, key=lambda item: -item.weight)
    return Verdict(
        cause=e.cause.id,
        family=e.cause.family,
        probability=probability,
        episodes=(episode.id,),
        summary=e.examination.summary,
        evidence=tuple(told),
        fixes=e.examination.fixes,
        change=e.examination.change,
        confirmed=e.examination.confirmed,
    )


def _over_run(episodes: Sequence[Episode], per_episode: Mapping[int, tuple[Verdict, ...]]) -> tuple[Verdict, ...]:
    weights = {
        e.id: min(max(e.severity, 1.0), MOST_SEVERE) if math.isfinite(e.severity) else MOST_SEVERE for e in episodes
    }
    whole = sum(weights.values())
    told = sorted(itertools.chain.from_iterable(per_episode.values()), key=lambda v: v.cause)
    joined = [_joined(list(group), weights, whole) for _, group in itertools.groupby(told, key=lambda v: v.cause)]
    listed = [v for v in joined if v.probability >= LEAST_PROBABILITY]
    return tuple(sorted(listed, key=lambda v: (-v.probability, v.cause)))


def _fixes(verdicts: Sequence[Verdict], clearest: Verdict) -> tuple[str, ...]:
    """Each episode has data of its own to mend, so the first fix of every one is told; the rest is that of the clearest."""
    ordered = sorted((v for v in verdicts if v.fixes), key=lambda v: v.episodes[0])
    own = tuple(dict.fromkeys(v.fixes[0] for v in ordered))
    more = (f"The same for {len(own) - MOST_FIXES} more episodes.",) if len(own) > MOST_FIXES else ()
    return (*own[:MOST_FIXES], *more, *clearest.fixes[1:])


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
