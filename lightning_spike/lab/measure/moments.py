"""What the optimizers remember of each parameter, by its name."""

import dataclasses

from torch import Tensor

from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.state import TrainState

__all__ = ["Moments", "moments_in"]

EPSILON = 1e-8
"""Where a parameter group names none; that of torch's optimizers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Of one parameter, before an update."""

    momentum: Tensor | None
    """The running mean (Adam) or sum (SGD) of the gradients, in the parameter's shape."""
    second: Tensor | None
    """The running mean of their squares, corrected for its start from zero where the optimizer does so."""
    epsilon: float


def moments_in(bench: Bench, state: TrainState) -> dict[str, Moments]:
    """Of every parameter that an optimizer has a state of."""
    names = {parameter: name for name, parameter in bench.module.named_parameters()}
    found: dict[str, Moments] = {}
    for optimizer, saved in zip(bench.trainer.optimizers, state.optimizers, strict=True):
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
