"""Turns the evidence about all causes of one episode into probabilities, with "unexplained" as one of the answers.

The model is tempered log-linear naive Bayes (science.md 3). The logit of a cause is the log of its prior plus a temper
times the sum of its weights; a softmax over the causes and "unexplained" gives probabilities. Before that, the evidence
of a cause is subtracted from that of its symptoms (explaining away). The numbers are fitted: see `weights`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import Evidence, Family

UPSTREAM_EVIDENCE: Final = 3.0
"""Evidence for a cause from which no symptom may rank above it: twenty to one, as the weakest replay (science.md
3.3)."""
SYMPTOMS_OF: Final[Mapping[Family, frozenset[str]]] = {
    Family.DATA: frozenset({"gradient_explosion"}),
    Family.LEARNING_RATE: frozenset({"gradient_explosion", "numerical_instability"}),
    Family.OPTIMIZER: frozenset({"gradient_explosion", "lr_too_high"}),
    Family.ENVIRONMENT: frozenset({"gradient_explosion", "numerical_instability", "lr_too_high"}),
    Family.NUMERICS: frozenset({"gradient_explosion"}),
}
"""Symptoms of every cause of a family; `Cause.explains` adds those of a single cause."""


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """A cause with the evidence about it in one episode."""

    cause: Cause
    evidence: tuple[Evidence, ...]
    confirmed: bool | None

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return sum(item.weight for item in self.evidence)

    @property
    def supported(self) -> bool:
        """Whether any evidence is for the cause; others are not listed."""
        return any(item.weight > 0.0 for item in self.evidence)


def probabilities(examined: Sequence[Examined], inherited: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """Probability by cause; the rest up to 1 is "unexplained".

    Args:
        examined: All causes that apply.
        inherited: Probability by cause in the episode that may go on in this one; it makes half of the prior.
        weights: The fitted numbers.
    """
    sums = totals(examined)
    prior_sum = sum(e.cause.prior for e in examined)
    logits = {}
    for e in examined:
        name = e.cause.id
        prior = (1.0 - weights.unexplained) * e.cause.prior / prior_sum
        prior = 0.5 * (prior + inherited[name]) if name in inherited else prior
        logits[name] = math.log(prior) + weights.offsets.get(name, 0.0) + weights.temper * sums[name]
    logits = _under_upstream(examined, logits, weights.temper)
    return _softmax(logits, math.log(weights.unexplained))


def _softmax(logits: Mapping[str, float], rest: float) -> dict[str, float]:
    top = max((*logits.values(), rest))
    shares = {name: math.exp(logit - top) for name, logit in logits.items()}
    whole = sum(shares.values()) + math.exp(rest - top)
    return {name: share / whole for name, share in shares.items()}


def totals(examined: Sequence[Examined]) -> dict[str, float]:
    """Sums of the weights, minus the evidence for the strongest cause upstream (explaining away)."""
    raw = {e.cause.id: e.total for e in examined}
    above = upstream([e.cause for e in examined])
    return {name: total - max((max(raw[up], 0.0) for up in above[name]), default=0.0) for name, total in raw.items()}


def _under_upstream(examined: Sequence[Examined], logits: Mapping[str, float], margin: float) -> dict[str, float]:
    """Cap the logit of every symptom below that of its causes with strong evidence."""
    raw = {e.cause.id: e.total for e in examined}
    capped = dict(logits)
    for name, above in upstream([e.cause for e in examined]).items():
        capped[name] = min([logits[name], *(logits[up] - margin for up in above if raw[up] >= UPSTREAM_EVIDENCE)])
    return capped


def symptoms(cause: Cause) -> frozenset[str]:
    """Ids of the causes that are symptoms of this one: those of its family and its own."""
    return (SYMPTOMS_OF.get(cause.family, frozenset()) | cause.explains) - {cause.id}


def upstream(causes: Sequence[Cause]) -> dict[str, set[str]]:
    """For every cause the causes upstream of it, directly or through others; two that claim each other do not count."""
    explains = {cause.id: symptoms(cause) for cause in causes}
    reach = {name: _reached(name, explains) for name in explains}
    return {
        name: {up for up in explains if up != name and name in reach[up] and up not in reach[name]} for name in explains
    }


def _reached(start: str, explains: Mapping[str, frozenset[str]]) -> set[str]:
    reached: set[str] = set()
    ahead = set(explains[start])
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead |= explains.get(name, frozenset())
    return reached
