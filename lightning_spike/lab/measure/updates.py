"""One update against those before it: second moments, momentum, length, and whether the step was too long or in a wrong direction."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from torch import Tensor

from lightning_spike.lab.replay.evaluate import losses_under
from lightning_spike.lab.replay.reproduce import ReplayedUpdate, Reproduction
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

STALE: Final = 2.3
"""RMS from which a second moment lags behind the gradients (Wortsman et al. 2023, arXiv:2304.13013)."""
OPPOSED: Final = -0.3
"""Cosine of momentum and gradient from which they point against each other; an engineering choice."""
LONG: Final = 3.0
"""Times the usual length from which an update is called long; an engineering choice."""
KEPT_PROMISE: Final = 0.5
"""Share of the promised change from which a step is ordinary; healthy ones have 0.83 to 0.96, steps that are too long less than 0 (science.md 2.3)."""
TURNED: Final = -0.01
"""Slope below which a gradient points up the loss that it was made from; rounding in float32 makes a hundredth of that."""
SHORT: Final = 1e-3
"""Share of the loss that the step promises by which the slope is measured: so short that nothing bends, and far above rounding."""
RECENT: Final = 4
"""Updates just before: what is usual is taken from them, and the step's direction is held against their gradients."""
EPSILON = 1e-8
"""Where a parameter group names none; that of torch's optimizers."""

Direction = Literal["ordinary", "too_long", "wrong_direction", "turned", "unclear"]
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMeasures:
    """One update; `None` for what an optimizer without such a state, or too few updates before, leave open."""

    ordinal: int
    """The batch that closed it."""
    step: int
    tensor: str | None
    """The parameter with the largest `rms`."""
    rms: float | None
    """sqrt(mean(g^2 / max(v, eps^2))) of that parameter, with the second moment v from *before* the update (corrected for its start), so that it is not bounded by 1 / sqrt(1 - beta2)."""
    rms_usual: float | None
    """The median of the same parameter's in the updates before."""
    cosine: float | None
    """Of the momentum before the update with its gradient, over all parameters."""
    cosine_usual: float | None
    length: float
    """L2 norm of the change of the parameters."""
    relative_length: float
    """That over the norm of the parameters."""
    length_usual: float | None
    """The median length of the updates before."""
    rho: float | None
    """Change of the loss of the update's own batches over `g . u`, what the gradient promised; 1 for a step short against the curvature, below 0 for one that overshot."""
    slope: float | None
    """What a step down the update's own gradient really takes off the loss of its batches, over what it promises, for a step too short to overshoot: 1 for the gradient of that loss, below 0 for one that
    points the other way. Asked where `rho` is no ordinary one, in float32."""
    slope_usual: float | None
    """The same of the earliest update of the re-run, where this one's is below 0: a module may reverse gradients by design."""
    against: float | None
    """Mean cosine of the step with the gradients of the updates just before; above 0 it goes up where other batches want down …"""
    against_error: float | None
    """… and its standard error."""
    direction: Direction
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Of one parameter, before an update."""

    momentum: Tensor | None
    """The running mean (Adam) or sum (SGD) of the gradients, in the parameter's shape."""
    second: Tensor | None
    """The running mean of their squares, corrected for its start from zero where the optimizer does so."""
    epsilon: float


def measure_update(sandbox: Sandbox, replay: Reproduction, leg: int) -> UpdateMeasures:
    """Measure one of the kept updates beside those before it; one forward pass for each of its batches, all else is kept from the re-run.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: The re-run.
        leg: The place of the update in `replay.updates_replayed`.
    """
    here, first = replay.updates_replayed[leg], max(leg - RECENT, 0)
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
    slope = _slope(sandbox, here) if rho is not None and rho < KEPT_PROMISE else None
    usual = _slope(sandbox, replay.updates_replayed[0]) if slope is not None and slope < TURNED and leg > 0 else None
    weights = _norm({name: here.before.weights[name] for name in steps[-1]})
    found = UpdateMeasures(
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
        rho=rho,
        slope=slope,
        slope_usual=usual,
        against=mean,
        against_error=error,
        direction=direction_of(rho, promise, mean, error, turned=usual is not None and usual > KEPT_PROMISE),
        text="",
    )
    return dataclasses.replace(found, text=_text(found))


def direction_of(
    rho: float | None, promise: float, against: float | None, error: float | None, *, turned: bool = False
) -> Direction:
    """Whether a step was too long or in a wrong direction (science.md 2.3); pure.

    Args:
        rho: Change over promise; `None` where there is none.
        promise: `g . u`; negative for a step down its own gradient.
        against: Mean cosine of the step with the gradients of other batches.
        error: Its standard error.
        turned: The gradient points up its own loss, and that of an earlier update does not.
    """
    if turned:
        return "turned"
    if against is not None and against > (error or 0.0):
        return "wrong_direction"
    if rho is None or promise >= 0.0:
        return "unclear"
    if rho >= KEPT_PROMISE:
        return "ordinary"
    return "too_long" if rho < 0.0 else "unclear"


def moments_in(sandbox: Sandbox, state: TrainState) -> dict[str, Moments]:
    """Of every parameter that an optimizer has a state of."""
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
    epsilon = group.get("eps", EPSILON)
    return Moments(
        momentum=momentum if isinstance(momentum, Tensor) else None,
        second=_second(entry, group),
        epsilon=float(epsilon) if isinstance(epsilon, (int, float, Tensor)) else EPSILON,
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
    """By parameter: how much larger the gradient is than its second moment knows."""
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
    """Of the mean loss of its own batches."""
    later = [float(losses_under(sandbox, weights, [entry], like=entry, held=True)[0]) for entry in leg.update.entries]
    return float(np.mean(later) - np.mean(leg.made.losses))


def _slope(sandbox: Sandbox, leg: ReplayedUpdate) -> float | None:
    gradients, weights = _dense(leg.made.gradients), leg.before.weights
    steepness, promise = _dot(gradients, gradients), SHORT * abs(float(np.mean(leg.made.losses)))
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


# -- in words ------------------------------------------------------------------------------------------------------------

DIRECTIONS: Final[Mapping[Direction, str]] = {
    "ordinary": "It changed the loss of its own batch about as its gradient promised.",
    "too_long": "It went down the gradient and overshot: the loss of its own batch rose, so the step was too long.",
    "wrong_direction": "It went up the gradients of the batches just before: the step had a wrong direction.",
    "turned": "A step down its gradient, however short, makes the loss of its own batch rise, which it did not before: the gradient points the other way.",
    "unclear": "Whether it was too long or in a wrong direction is not clear.",
}


def _text(found: UpdateMeasures) -> str:
    parts = [f"The update at step {found.step} changed the weights by {found.relative_length:.2g} of their size"]
    if found.length_usual:
        ratio = found.length / found.length_usual
        parts[0] += f", {ratio:.3g} times the usual" if ratio >= LONG or ratio <= 1 / LONG else ", a usual length"
    parts[0] += "."
    if found.rms is not None and found.rms >= STALE:
        usual = "" if found.rms_usual is None else f" (usually {found.rms_usual:.2g})"
        parts.append(f"The gradient of {found.tensor} was {found.rms:.3g} times what its second moment knew{usual}.")
    if found.cosine is not None and found.cosine <= OPPOSED:
        parts.append(f"Its momentum pointed against its gradient (cosine {found.cosine:.2f}).")
    return " ".join([*parts, DIRECTIONS[found.direction]])
