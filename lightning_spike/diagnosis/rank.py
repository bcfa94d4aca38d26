"""Evidence to probabilities: every cause examines every episode, and the answers are weighed against each other and against "unexplained".

The model is tempered log-linear naive Bayes (science.md 3): the logit of a cause is the log of its prior plus `TEMPER` times the sum of its log likelihood
ratios; a softmax over the causes and "unexplained" makes probabilities. Before that, symptoms give way to what brought them about.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import LEAST_PROBABILITY, TEMPER, UNEXPLAINED, UPSTREAM
from lightning_spike.diagnosis.experiment import with_experiment
from lightning_spike.records import Episode, EpisodeKind, Family, Moment, Verdict
from lightning_spike.store import TrainerStateStore

__all__ = ["Diagnosis", "diagnose", "not_run_again"]

MOST_FIXES = 4
"""Episodes whose data are named in the verdict over the run."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Examined:
    cause: Cause
    examination: Examination


def diagnose(store: TrainerStateStore, causes: Iterable[Cause] | None = None) -> Diagnosis:
    """Rank the causes of every episode, and over the run.

    Pure: the store is only read, and the same store gives the same answer. Takes some milliseconds an episode.

    Args:
        store: The run, finished or not.
        causes: The causes to choose from; all of the catalogue by default.
    """
    known = tuple(catalogue() if causes is None else causes)
    remarks = _not_run_again(store)
    per_episode: dict[int, tuple[Verdict, ...]] = {}
    for episode in store.episodes:
        per_episode[episode.id] = _rank(Case(store, episode), known, remarks, per_episode)
    overall = _over_run(store.episodes, per_episode) if store.episodes else _without_episode(store, known, remarks)
    return Diagnosis(per_episode=MappingProxyType(per_episode), overall=overall, remarks=tuple(dict.fromkeys(remarks)))


def _without_episode(store: TrainerStateStore, causes: Sequence[Cause], remarks: list[str]) -> tuple[Verdict, ...]:
    """Of a run whose loss shows nothing: what is wrong in it all the same, by the findings that show a cause by themselves."""
    concerned = {(f.detector, f.kind): f.at for f in reversed(store.findings)}
    shown = [cause for cause in causes if cause.standing & concerned.keys()]
    if not shown:
        return ()
    first = min((concerned[found] for cause in shown for found in cause.standing & concerned.keys()), key=_ordinal)
    quiet = Episode(id=0, kind=EpisodeKind.STALL, onset=first, noticed=first, peak=first)
    examined = [e for cause in shown if (e := _examine(cause, Case(store, quiet), remarks)) is not None]
    return tuple(dataclasses.replace(v, episodes=()) for v in _verdicts(examined, quiet, {}))


def _ordinal(moment: Moment) -> int:
    return moment.ordinal


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


def _rank(
    case: Case, causes: Sequence[Cause], remarks: list[str], earlier: Mapping[int, tuple[Verdict, ...]]
) -> tuple[Verdict, ...]:
    examined = [
        e for cause in causes if case.kind in cause.applies_to and (e := _examine(cause, case, remarks)) is not None
    ]
    return _verdicts(examined, case.episode, _inherited(case, earlier))


def _verdicts(examined: Sequence[_Examined], episode: Episode, inherited: Mapping[str, float]) -> tuple[Verdict, ...]:
    probabilities = _probabilities(examined, inherited)
    verdicts = [
        _verdict(e, probabilities[e.cause.id], episode)
        for e in examined
        if e.examination.speaks and probabilities[e.cause.id] >= LEAST_PROBABILITY
    ]
    return tuple(sorted(verdicts, key=lambda v: (-v.probability, v.cause)))


def _examine(cause: Cause, case: Case, remarks: list[str]) -> _Examined | None:
    try:
        examination = with_experiment(cause, case, cause.examine(case))
    except Exception as error:  # noqa: BLE001 - a cause may come from any package; its failure is reported, not hidden
        remarks.append(f"The cause {cause.id} could not be examined: {type(error).__name__}: {error}")
        return None
    return _Examined(cause, examination) if math.isfinite(examination.total) else None


def _inherited(case: Case, earlier: Mapping[int, tuple[Verdict, ...]]) -> Mapping[str, float]:
    """What is known of the episode of which this one may be the rest: half of the prior is its verdict."""
    if case.previous is None:
        return {}
    return {v.cause: v.probability for v in earlier.get(case.previous.id, ())}


def _probabilities(examined: Sequence[_Examined], inherited: Mapping[str, float]) -> dict[str, float]:
    totals = _explained_away(examined)
    prior_sum = sum(e.cause.prior for e in examined)
    logits = {}
    for e in examined:
        prior = (1.0 - UNEXPLAINED) * e.cause.prior / prior_sum
        known = inherited.get(e.cause.id)
        logits[e.cause.id] = math.log(prior if known is None else 0.5 * (prior + known)) + TEMPER * totals[e.cause.id]
    logits = _under_upstream(examined, logits)
    top = max((*logits.values(), math.log(UNEXPLAINED)))
    shares = {name: math.exp(logit - top) for name, logit in logits.items()}
    whole = sum(shares.values()) + math.exp(math.log(UNEXPLAINED) - top)
    return {name: share / whole for name, share in shares.items()}


def _explained_away(examined: Sequence[_Examined]) -> dict[str, float]:
    """Sums of the log likelihood ratios, less those of the strongest cause upstream as far as they speak for it."""
    raw = {e.cause.id: e.examination.total for e in examined}
    upstream = _upstream(examined)
    return {name: total - max((max(raw[up], 0.0) for up in upstream[name]), default=0.0) for name, total in raw.items()}


def _under_upstream(examined: Sequence[_Examined], logits: Mapping[str, float]) -> dict[str, float]:
    """No symptom above a cause of it that has real evidence."""
    raw = {e.cause.id: e.examination.total for e in examined}
    capped = dict(logits)
    for name, above in _upstream(examined).items():
        capped[name] = min([logits[name], *(logits[up] - TEMPER for up in above if raw[up] >= UPSTREAM)])
    return capped


def _upstream(examined: Sequence[_Examined]) -> dict[str, set[str]]:
    """For every cause those that bring it about, directly or through others; two that claim each other are left alone."""
    explains = {e.cause.id: set(e.cause.explains) for e in examined}
    reach = {name: _reached(name, explains) for name in explains}
    return {
        name: {up for up in explains if up != name and name in reach[up] and up not in reach[name]} for name in explains
    }


def _reached(start: str, explains: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    ahead = set(explains[start])
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead |= explains.get(name, set())
    return reached


def _verdict(e: _Examined, probability: float, episode: Episode) -> Verdict:
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
        episodes=tuple(v.episodes[0] for v in sorted(verdicts, key=lambda v: v.episodes[0])),
        fixes=fixes,
        confirmed=True if True in answers else next(iter(answers), None),
    )
