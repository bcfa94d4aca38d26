"""Evidence to probabilities: what the causes say of one episode, weighed against each other and against "unexplained".

The model is tempered log-linear naive Bayes (science.md 3): the logit of a cause is the log of its prior plus a temper
times the sum of its weights; a softmax over the
causes and "unexplained" makes probabilities. Before that, symptoms give way to the causes that bring them about. The
numbers are fitted: see `weights`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from lightning_spike.diagnosis.cause import Cause
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import Evidence, Family

UPSTREAM_EVIDENCE: Final = 3.0
"""Evidence for a cause from which none of its symptoms may rank above it: twenty to one, the lower end of what a replay
is worth (science.md 3.3)."""
SYMPTOMS_OF: Mapping[Family, frozenset[str]] = MappingProxyType(
    {
        Family.DATA: frozenset({"gradient_explosion"}),
        Family.LEARNING_RATE: frozenset({"gradient_explosion", "numerical_instability"}),
        Family.OPTIMIZER: frozenset({"gradient_explosion", "lr_too_high"}),
        Family.ENVIRONMENT: frozenset({"gradient_explosion", "numerical_instability", "lr_too_high"}),
        Family.NUMERICS: frozenset({"gradient_explosion"}),
    }
)
"""What every cause of a family brings about; `Cause.explains` has what one brings about beside that."""


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """A cause, and what was observed about it in an episode."""

    cause: Cause
    evidence: tuple[Evidence, ...]
    confirmed: bool | None

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return sum(item.weight for item in self.evidence)

    @property
    def supported(self) -> bool:
        """Whether anything at all speaks for the cause; one without is not listed."""
        return any(item.weight > 0.0 for item in self.evidence)


def probabilities(examined: Sequence[Examined], inherited: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """Probability by cause; what they leave up to 1 is "unexplained".

    Args:
        examined: All causes that apply.
        inherited: By cause its probability in the episode of which this one may be the rest: half of the prior.
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
    """Sums of the weights, less the evidence for the strongest cause upstream (explaining away)."""
    raw = {e.cause.id: e.total for e in examined}
    above = upstream([e.cause for e in examined])
    return {name: total - max((max(raw[up], 0.0) for up in above[name]), default=0.0) for name, total in raw.items()}


def _under_upstream(examined: Sequence[Examined], logits: Mapping[str, float], margin: float) -> dict[str, float]:
    """No symptom above a cause of it that has strong evidence."""
    raw = {e.cause.id: e.total for e in examined}
    capped = dict(logits)
    for name, above in upstream([e.cause for e in examined]).items():
        capped[name] = min([logits[name], *(logits[up] - margin for up in above if raw[up] >= UPSTREAM_EVIDENCE)])
    return capped


def symptoms(cause: Cause) -> frozenset[str]:
    """Ids of the causes that this one brings about: those of its family and its own."""
    return (SYMPTOMS_OF.get(cause.family, frozenset()) | cause.explains) - {cause.id}


def upstream(causes: Sequence[Cause]) -> dict[str, set[str]]:
    """For every cause those that bring it about, directly or through others.

    Two that claim each other are left alone.
    """
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
