"""Evidence to probabilities: what the causes say of one episode, weighed against each other and against "unexplained".

The model is tempered log-linear naive Bayes (science.md 3): the logit of a cause is the log of its prior plus a temper times the sum of its log likelihood
ratios; a softmax over the causes and "unexplained" makes probabilities. Before that, symptoms give way to what brought them about. The numbers are fitted:
see `calibration`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lightning_spike.diagnosis.calibration import Calibration
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import UPSTREAM


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """A cause, and what it says of an episode."""

    cause: Cause
    examination: Examination


def probabilities(
    examined: Sequence[Examined], inherited: Mapping[str, float], calibration: Calibration
) -> dict[str, float]:
    """Probability by cause; what they leave up to 1 is "unexplained".

    Args:
        examined: All causes that were asked.
        inherited: By cause its probability in the episode of which this one may be the rest: half of the prior.
        calibration: The fitted numbers.
    """
    sums = totals(examined)
    prior_sum = sum(e.cause.prior for e in examined)
    logits = {}
    for e in examined:
        name = e.cause.id
        prior = (1.0 - calibration.unexplained) * e.cause.prior / prior_sum
        prior = 0.5 * (prior + inherited[name]) if name in inherited else prior
        logits[name] = math.log(prior) + calibration.offsets.get(name, 0.0) + calibration.temper * sums[name]
    logits = _under_upstream(examined, logits, calibration.temper)
    return _softmax(logits, math.log(calibration.unexplained))


def _softmax(logits: Mapping[str, float], rest: float) -> dict[str, float]:
    top = max((*logits.values(), rest))
    shares = {name: math.exp(logit - top) for name, logit in logits.items()}
    whole = sum(shares.values()) + math.exp(rest - top)
    return {name: share / whole for name, share in shares.items()}


def totals(examined: Sequence[Examined]) -> dict[str, float]:
    """Sums of the log likelihood ratios, less those of the strongest cause upstream as far as they speak for it."""
    raw = {e.cause.id: e.examination.total for e in examined}
    above = upstream(examined)
    return {name: total - max((max(raw[up], 0.0) for up in above[name]), default=0.0) for name, total in raw.items()}


def _under_upstream(examined: Sequence[Examined], logits: Mapping[str, float], margin: float) -> dict[str, float]:
    """No symptom above a cause of it that has real evidence."""
    raw = {e.cause.id: e.examination.total for e in examined}
    capped = dict(logits)
    for name, above in upstream(examined).items():
        capped[name] = min([logits[name], *(logits[up] - margin for up in above if raw[up] >= UPSTREAM)])
    return capped


def upstream(examined: Sequence[Examined]) -> dict[str, set[str]]:
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
