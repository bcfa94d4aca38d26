"""What is observed about one episode for one cause.

Its observers run, their levels weighed, and whether experiments confirm it.
"""

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
    """Every cause that applies to this kind of episode; one that breaks is left out and named in `remarks`."""
    fitting = [cause for cause in causes if view.kind in cause.applies_to]
    return [found for cause in fitting if (found := examine(cause, view, weights, remarks)) is not None]


def examine(cause: Cause, view: EpisodeView, weights: Weights, remarks: list[str]) -> Examined | None:
    """One cause; `None` where it breaks, which `remarks` then names, or where its evidence is not finite."""
    try:
        found = _observed(cause, view, weights)
    except Exception as error:  # noqa: BLE001 - a cause may come from any package; its failure is reported, not hidden
        remarks.append(f"The cause {cause.id} could not be examined: {type(error).__name__}: {error}")
        return None
    return found if math.isfinite(found.total) else None


def _observed(cause: Cause, view: EpisodeView, weights: Weights) -> Examined:
    missing = _weighed(cause, cause.requires, view, weights)
    seen = missing[:1] or _weighed(cause, cause.observations, view, weights)
    # A share of the jump proves what something speaks for; alone it names a group and no cause of it.
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
    """What the observers saw, with what it weighs; a level without a weight for this cause is no evidence about it."""
    pairs = ((one, found) for one in observers if (found := one(view)) is not None)
    weighed = ((one, o, weights.of(cause.id, one.name, o.level, cause.weights)) for one, o in pairs)
    return [(_evidence(one, o, weight), o) for one, o, weight in weighed if weight is not None]


def _evidence(observer: Observer, seen: Observation, weight: float) -> Evidence:
    return Evidence(
        signal=seen.signal,
        step=seen.step,
        observed=seen.observed,
        expected=seen.expected,
        text=seen.text,
        weight=weight,
        observation=observer.name,
        level=seen.level,
    )


def by_weight(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The evidence as it is told: what speaks for the cause most comes first."""
    return tuple(sorted(evidence, key=lambda item: -item.weight))
