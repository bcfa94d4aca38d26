"""Runs the observers of a cause on one episode, weighs their levels, and says whether experiments confirm the cause."""

import math
from collections.abc import Iterable, Sequence

from lightning_spike.diagnosis import judgement
from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.observation import Observation, Observer
from lightning_spike.diagnosis.observations.experiments import share_of_jump
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.diagnosis.weigh import Examined
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import Evidence


def examine_all(view: EpisodeView, causes: Iterable[Cause], weights: Weights, remarks: list[str]) -> list[Examined]:
    """Examine every cause that applies to this kind of episode; `remarks` names those that raised."""
    fitting = [cause for cause in causes if view.kind in cause.applies_to]
    return [found for cause in fitting if (found := examine(cause, view, weights, remarks)) is not None]


def examine(cause: Cause, view: EpisodeView, weights: Weights, remarks: list[str]) -> Examined | None:
    """Examine one cause; `None` where it raised, which `remarks` then says, or where its evidence is not finite."""
    try:
        found = _observed(cause, view, weights)
    except Exception as error:  # noqa: BLE001 - a cause may come from any package; its failure is reported, not hidden
        remarks.append(f"The cause {cause.id} could not be examined: {type(error).__name__}: {error}")
        return None
    return found if math.isfinite(found.total) else None


def _observed(cause: Cause, view: EpisodeView, weights: Weights) -> Examined:
    missing = _weighed(cause, cause.requires, view, weights)
    seen = missing[:1] or _weighed(cause, cause.observations, view, weights)
    # A share of the jump confirms a cause that other evidence supports; alone it names only a group.
    supported = any(item.weight > 0.0 for item, _ in seen)
    shares = _weighed(cause, [share_of_jump(cause.tested_by)], view, weights)
    seen += [(item, share) for item, share in shares if supported or item.weight < 0.0]
    answers = [observation.confirms for _, observation in seen]
    by_share = [observation.confirms for item, observation in seen if item.observation == "share_of_jump"]
    confirmed = judgement.confirmed(by_share if any(a is not None for a in by_share) else answers)
    return Examined(cause, tuple(item for item, _ in seen), confirmed)


def _weighed(
    cause: Cause, observers: Sequence[Observer], view: EpisodeView, weights: Weights
) -> list[tuple[Evidence, Observation]]:
    """The observations with their weights; a level without a weight for this cause is no evidence about it."""
    pairs = ((one, found) for one in observers if (found := one(view)) is not None)
    weighed = ((one, o, weights.of(cause.id, one.name, o.level, cause.weights)) for one, o in pairs)
    return [(_evidence(one, o, weight), o) for one, o, weight in weighed if weight is not None]


def _evidence(observer: Observer, seen: Observation, weight: float) -> Evidence:
    return Evidence(
        signal=seen.signal, step=seen.step, observed=seen.observed, expected=seen.expected, text=seen.text,
        weight=weight, observation=observer.name, level=seen.level,
    )  # fmt: skip


def by_weight(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The evidence in the order of the report: the strongest for the cause first."""
    return tuple(sorted(evidence, key=lambda item: -item.weight))
