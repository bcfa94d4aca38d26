"""One update against those before it.

Second moments, momentum, length, and whether the step was too long or in a wrong direction.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from torch import Tensor

from lightning_spike.diagnosis.judgement import ORDINARY_RHO, TURNED_SLOPE
from lightning_spike.experiments import UpdateMeasurement
from lightning_spike.lab.replay.evaluate import losses_under
from lightning_spike.lab.replay.reproduce import ReplayedUpdate, Reproduction
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

SLOPE_DECREASE: Final = 1e-3
"""Share of the loss that the step for measuring the slope predicts, above rounding and below curvature;
engineering choice."""
RECENT_UPDATES: Final = 4
"""Previous updates that give the normal values and the gradients to compare the step's direction with;
engineering choice."""
DEFAULT_EPSILON = 1e-8
"""Epsilon of a parameter group without one, by definition of torch's optimizers."""

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """The state of one parameter before an update."""

    momentum: Tensor | None
    """The running mean (Adam) or sum (SGD) of the gradients, in the parameter's shape."""
    second: Tensor | None
    """The running mean of their squares, corrected for its start from zero where the optimizer does so."""
    epsilon: float


def measure_update(sandbox: Sandbox, replay: Reproduction, leg: int) -> UpdateMeasurement:
    """Measure one of the kept updates beside those before it.

    One forward pass for each of its batches, all else is kept from the replay.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: The replay.
        leg: The place of the update in `replay.updates_replayed`.
    """
    here, first = replay.updates_replayed[leg], max(leg - RECENT_UPDATES, 0)
    updates_replayed = replay.updates_replayed[first : leg + 1]
    states = [one.before for one in replay.updates_replayed[first:]] + [replay.end]
    known = [moments_in(sandbox, one.before) for one in updates_replayed]
    ratios = [_rms(moments, one) for moments, one in zip(known, updates_replayed, strict=True)]
    tensor = max(ratios[-1], key=lambda name: ratios[-1][name], default=None)
    cosines = [_momentum_cosine(moments, one) for moments, one in zip(known, updates_replayed, strict=True)]
    steps = [_step(sandbox, states[k], states[k + 1]) for k in range(len(updates_replayed))]
    lengths = [_norm(step) for step in steps]
    change = _change(sandbox, here, states[len(updates_replayed)].weights)
    promise = _dot(_dense(here.made.gradients), steps[-1])
    against = [_cosine(_dense(one.made.gradients), steps[-1]) for one in updates_replayed[:-1]]
    mean, error = _mean(against)
    rho = change / promise if promise != 0.0 and math.isfinite(change / promise) else None
    slope = _slope(sandbox, here) if rho is not None and rho < ORDINARY_RHO else None
    usual = (
        _slope(sandbox, replay.updates_replayed[0]) if slope is not None and slope < TURNED_SLOPE and leg > 0 else None
    )
    weights = _norm({name: here.before.weights[name] for name in steps[-1]})
    return UpdateMeasurement(
        ordinal=here.update.ordinal,
        step=here.update.entries[-1].at.step,
        tensor=tensor,
        rms=None if tensor is None else ratios[-1][tensor],
        rms_usual=None if tensor is None else _median([r[tensor] for r in ratios[:-1] if tensor in r]),
        cosine=cosines[-1],
        cosine_usual=_median([c for c in cosines[:-1] if c is not None]),
        length=lengths[-1],
        relative_length=lengths[-1] / weights if weights > 0 else math.inf,
        length_usual=_median(lengths[:-1]),
        promised=promise,
        rho=rho,
        slope=slope,
        slope_usual=usual,
        against=mean,
        against_error=error,
    )


def moments_in(sandbox: Sandbox, state: TrainState) -> dict[str, Moments]:
    """The state of every parameter that an optimizer has a state for."""
    names = {parameter: name for name, parameter in sandbox.module.named_parameters()}
    found: dict[str, Moments] = {}
    for optimizer, saved in zip(sandbox.trainer.optimizers, state.optimizers, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in saved["param_groups"]:
            for place in group["params"]:
                name, entry = names.get(parameters[place]), saved["state"].get(place)
                if name is not None and entry:
                    found[name] = _moments(entry, group)
    return found


def _moments(entry: dict[str, object], group: dict[str, object]) -> Moments:
    momentum = entry.get("exp_avg", entry.get("momentum_buffer"))
    epsilon = group.get("eps", DEFAULT_EPSILON)
    return Moments(
        momentum=momentum if isinstance(momentum, Tensor) else None,
        second=_second(entry, group),
        epsilon=float(epsilon) if isinstance(epsilon, (int, float, Tensor)) else DEFAULT_EPSILON,
    )


def _second(entry: dict[str, object], group: dict[str, object]) -> Tensor | None:
    corrected, plain = entry.get("exp_avg_sq"), entry.get("square_avg")
    if not isinstance(corrected, Tensor):
        return plain if isinstance(plain, Tensor) else None
    step, betas = entry.get("step"), group.get("betas")
    if not isinstance(step, (int, float, Tensor)) or not isinstance(betas, (tuple, list)):
        return corrected
    done = float(step)
    return corrected / (1.0 - float(betas[1]) ** done) if done > 0 else None


def _rms(moments: Mapping[str, Moments], leg: ReplayedUpdate) -> dict[str, float]:
    """RMS_t = sqrt(mean(g² / max(v, eps²))) by parameter."""
    gradients, found = _dense(leg.made.gradients), {}
    for name, known in moments.items():
        if known.second is not None and name in gradients:
            floor = known.second.double().clamp_min(known.epsilon**2)
            found[name] = float((gradients[name].double().square() / floor).mean().sqrt())
    return found


def _momentum_cosine(moments: Mapping[str, Moments], leg: ReplayedUpdate) -> float | None:
    momenta = {name: m.momentum for name, m in moments.items() if m.momentum is not None}
    gradients = _dense(leg.made.gradients)
    return _cosine({n: g for n, g in gradients.items() if n in momenta}, momenta) if momenta else None


def _step(sandbox: Sandbox, before: TrainState, after: TrainState) -> dict[str, Tensor]:
    names = [name for name, parameter in sandbox.module.named_parameters() if parameter.is_floating_point()]
    return {name: after.weights[name] - before.weights[name] for name in names if name in before.weights}


def _change(sandbox: Sandbox, leg: ReplayedUpdate, weights: Tensors) -> float:
    """Change of the mean loss of the update's own batches under other weights."""
    later = [float(losses_under(sandbox, weights, [entry], like=entry, held=True)[0]) for entry in leg.update.entries]
    return float(np.mean(later) - np.mean(leg.made.losses))


def _slope(sandbox: Sandbox, leg: ReplayedUpdate) -> float | None:
    gradients, weights = _dense(leg.made.gradients), leg.before.weights
    steepness, promise = _dot(gradients, gradients), SLOPE_DECREASE * abs(float(np.mean(leg.made.losses)))
    if not 0.0 < steepness < math.inf or not 0.0 < promise < math.inf or "16" in str(sandbox.trainer.precision):
        return None
    moved = {name: weights[name] - promise / steepness * gradient for name, gradient in gradients.items()}
    return -_change(sandbox, leg, {**weights, **moved}) / promise


def _dense(gradients: Tensors) -> dict[str, Tensor]:
    return {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}


def _dot(a: Tensors, b: Tensors) -> float:
    return float(sum(g.double().flatten() @ b[name].double().flatten() for name, g in a.items() if name in b))


def _norm(a: Tensors) -> float:
    return math.sqrt(_dot(a, a))


def _cosine(a: Tensors, b: Tensors) -> float | None:
    """`None` where one of them is zero or not finite."""
    shared = {name: b[name] for name in a if name in b}
    size = _norm({name: a[name] for name in shared}) * _norm(shared)
    return _dot(a, shared) / size if 0.0 < size < math.inf else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return float(np.mean(known)), error
