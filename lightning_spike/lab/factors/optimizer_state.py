"""What the optimizer remembers: its momentum and its second moments, apart and together."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from torch import Tensor
from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.state import TrainState
from lightning_spike.lab.update import Update

__all__ = ["Momentum", "OptimizerState", "SecondMoments"]

FIRST: Final = ("exp_avg", "momentum_buffer")
"""Where the optimizers of torch keep their momentum."""
SECOND: Final = ("exp_avg_sq", "square_avg")
"""… and the running mean of the squared gradients."""
FRESH: Final = 4
"""Updates whose gradients make a second moment of their own; fewer say little about each element."""

STALE: Final = 1.5
"""How many times larger the recent mean square of a tensor's gradients must be for its second moment to be called stale; a step is then a fifth too long."""

States = list[dict[str, Any]]


class Momentum(Factor):
    """The momentum, against that of the oldest update that was made again."""

    id: ClassVar = "momentum"
    group: ClassVar = "optimizer"
    title: ClassVar = "the momentum"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        return _replaced(update, around, FIRST, lambda k, place, key, _: _entry(around.oldest.before, k, place, key))


class SecondMoments(Factor):
    """The second moments, against such as have kept up with the gradients of the last updates.

    A second moment that lags behind gradients that grew (1 / (1 - beta2) steps) is stale, and was as stale a dozen steps ago; so its normal value is not
    its recent one. It is multiplied by how much larger the mean squared gradient since then is, over the whole tensor (element by element a dozen
    gradients are noise); the difference of two states of it gives that mean.
    """

    id: ClassVar = "second_moments"
    group: ClassVar = "optimizer"
    title: ClassVar = "the second moments"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        steps = len(around.legs) - 1
        if steps < FRESH:
            return None

        def kept_up(optimizer: int, place: int, key: str, now: Tensor) -> Tensor | None:
            then = _entry(around.oldest.before, optimizer, place, key)
            decay = _decay(around, optimizer, place)
            if then is None or decay is None or not 0.0 < decay < 1.0:
                return None
            faded = decay**steps
            held = float(now.mean()) / _filled(around, optimizer, place, key, decay)
            fresh = float((now - faded * then).mean()) / (1.0 - faded)
            return now * (fresh / held) if 0.0 < STALE * held < fresh < math.inf else None

        return _replaced(update, around, SECOND, kept_up)


class OptimizerState(Factor):
    """Both together: whatever the optimizer remembers."""

    id: ClassVar = "optimizer_state"
    group: ClassVar = "optimizer"
    title: ClassVar = "the optimizer's state"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        first = Momentum().normal(update, around)
        second = SecondMoments().normal(first or update, around)
        return second or first


def _replaced(
    update: Update, around: Around, keys: tuple[str, ...], value: Callable[[int, int, str, Tensor], Tensor | None]
) -> Update | None:
    """The update with some tensors of the optimizers' states exchanged; `None` where there are none of these, or nothing is remembered from before."""
    if len(around.legs) < 2:  # noqa: PLR2004 - the update itself and one before
        return None
    found = False

    def exchanged(optimizer: int, place: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal found
        out = dict(entry)
        for key in keys:
            if isinstance(entry.get(key), Tensor) and (new := value(optimizer, place, key, entry[key])) is not None:
                out[key], found = new, True
        return out

    states: States = update.optimizers or around.legs[-1].before.optimizers
    changed = [
        {**state, "state": {place: exchanged(k, place, entry) for place, entry in state["state"].items()}}
        for k, state in enumerate(states)
    ]
    return dataclasses.replace(update, optimizers=changed) if found else None


def _entry(state: TrainState, optimizer: int, place: int, key: str) -> Tensor | None:
    held = state.optimizers[optimizer]["state"].get(place, {}).get(key)
    return held if isinstance(held, Tensor) else None


def _decay(around: Around, optimizer: int, place: int) -> float | None:
    """beta2 of the parameter's group: `betas` of Adam's kind, `alpha` of RMSprop."""
    groups = around.oldest.before.optimizers[optimizer]["param_groups"]
    group: Mapping[str, Any] = next((g for g in groups if place in g["params"]), {})
    betas = group.get("betas")
    decay = betas[1] if isinstance(betas, tuple | list) and len(betas) > 1 else group.get("alpha")
    return float(decay) if decay is not None else None


def _filled(around: Around, optimizer: int, place: int, key: str, decay: float) -> float:
    """How much of its weight a second moment has by now: Adam's begins at zero and is corrected for that, RMSprop's is not (Kingma and Ba 2015, section 3)."""
    step = around.legs[-1].before.optimizers[optimizer]["state"].get(place, {}).get("step")
    if key != "exp_avg_sq" or step is None or not float(step) > 0.0:
        return 1.0
    return float(1.0 - decay ** float(step))
