"""The state that the training itself had before an update: the update undone, from the state after it."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.record.update_settings import PLACE
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MIN_ROUNDING_ERRORS: Final = 300.0
"""Rounding errors of the largest later second moment from which an earlier one is known well enough, to 1 part in as
many; engineering choice."""
MAX_ROUNDING_GRADIENT: Final = 1e-10
"""Share of a typical tensor's mean square gradient up to which a gradient is only rounding, as of a bias before
BatchNorm (1e-14 in float32); engineering choice."""
SECOND: Final = "exp_avg_sq"
"""The state of Adam that gradients go into squared."""

Entry = Mapping[str, Any]
Entries = Mapping[int, Entry]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewoundState:
    """A state that was come back to."""

    state: TrainState
    unsure: Mapping[str, Tensor]
    """Mask of the unknown elements, by the weight's name; bool."""


def can_rewind_updates(sandbox: Sandbox) -> bool:
    """Whether updates of this run can be undone.

    SGD with momentum, Adam or AdamW as torch has them, under automatic optimisation, on one rank and without a loss
    scaler.
    """
    optimizers = sandbox.trainer.optimizers
    return (
        sandbox.trainer.world_size == 1
        and sandbox.module.automatic_optimization
        and len(optimizers) == 1
        and getattr(sandbox.trainer.precision_plugin, "scaler", None) is None
        and type(optimizers[0]) in (SGD, Adam, AdamW)
        and all(_is_plain(group) for group in optimizers[0].param_groups)
    )


def rewind_updates(
    sandbox: Sandbox, updates: Sequence[Update], present: TrainState, like: Mapping[int, TrainState]
) -> Iterator[RewoundState]:
    """Returns weights and optimizer state before each of the last updates, the newest first.

    Up to rounding.

    What these optimizers add to the weights depends on their state after the update alone, so the weights before it are
    had without a gradient. With them the gradient is computed once more (one forward and backward pass through
    Lightning's loop, clipping and accumulation as in the run), and taken out of
    the averages: m = (m' - (1 - beta) g) / beta. Every update undone multiplies the rounding of m by 1 / beta. A second
    moment to which the square of a far larger gradient
    was added is known to the rounding of that only: of the weights that are had by dividing by it it is said that they
    are unsure, and of those whose gradients are nothing but rounding. Ends early where a gradient is not finite or
    missing, or some of the state is.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`, of a run that `can_rewind_updates`.
        updates: What was made, oldest first.
        present: The state after them.
        like: By the ordinal of an update's first batch, the state to compare with. Buffers and the module's own
            attributes are taken from it too: no gradient in train mode depends on running statistics.
    """
    known, state = _Known(), present
    for update in reversed(updates):
        rewound = _undone(sandbox, update, state, like[update.entries[0].at.ordinal], known)
        if rewound is None:
            return
        yield rewound
        state = rewound.state


class _Known:
    """Which second moments are known well enough to divide by them."""

    def __init__(self) -> None:
        self._peaks: dict[int, Tensor] = {}
        """The largest so far, whose rounding is in all earlier ones."""
        self.unsure: dict[int, Tensor] = {}

    def take(self, before: dict[int, dict[str, Any]], after: Entries, like: Entries) -> None:
        """Look at the second moments of one update, and correct in place what is not known of them."""
        places = [place for place, entry in before.items() if SECOND in entry and SECOND in like.get(place, {})]
        usual = statistics.median([float(like[place][SECOND].mean()) for place in places] or [0.0])
        for place in places:
            held, later, likely = before[place][SECOND], after[place][SECOND], like[place][SECOND]
            peak = torch.maximum(self._peaks[place], later) if place in self._peaks else later
            rounding = torch.finfo(held.dtype).eps * peak
            is_noise = float(likely.mean()) < MAX_ROUNDING_GRADIENT * usual
            self.unsure[place] = (
                torch.ones_like(held, dtype=torch.bool) if is_noise else held < MIN_ROUNDING_ERRORS * rounding
            )
            before[place][SECOND] = torch.where(
                rounding > likely / MIN_ROUNDING_ERRORS, likely, torch.maximum(held, rounding)
            )
            self._peaks[place] = peak


def _undone(
    sandbox: Sandbox, update: Update, after: TrainState, like: TrainState, known: _Known
) -> RewoundState | None:
    """One update less."""
    optimizer = sandbox.trainer.optimizers[0]
    groups, names = _groups(after, update), _names(sandbox, optimizer)
    entries = after.optimizers[0]["state"]
    if any(place not in names or not _is_whole(optimizer, entry) for place, entry in entries.items()):
        return None
    weights = {n: (after if n in names.values() else like).weights[n] for n in like.weights}
    for place, entry in entries.items():
        weights[names[place]] = _weights_before(optimizer, groups[place], entry, weights[names[place]])
    empty = {place: _emptied(entry) for place, entry in entries.items()}
    start = dataclasses.replace(
        like, at=update.entries[0].at, weights=weights, optimizers=[{**after.optimizers[0], "state": empty}]
    )
    sandbox.rewind()
    start.load(sandbox)
    made = make_update(sandbox, update)
    if made.spoilt_at is not None or any(names[place] not in made.gradients for place in entries):
        return None
    fresh = TrainState.take(sandbox, like.at).optimizers[0]["state"]
    before = {place: _before(groups[place], entry, fresh[place]) for place, entry in entries.items()}
    unsure = {names[place]: mask for place, mask in known.unsure.items()}
    known.take(before, entries, like.optimizers[0]["state"])
    state = dataclasses.replace(start, optimizers=[{**after.optimizers[0], "state": before}])
    return RewoundState(state=state, unsure=unsure)


def _is_plain(group: Entry) -> bool:
    """The forms of the update that depend on nothing but the state after it."""
    if any(group.get(key) for key in ("nesterov", "amsgrad", "maximize")):
        return False
    return bool(group["momentum"]) if "momentum" in group else all(0.0 < beta < 1.0 for beta in group["betas"])


def _groups(after: TrainState, update: Update) -> dict[int, dict[str, Any]]:
    """Group settings of the update, by the parameter's index."""
    groups = after.optimizers[0]["param_groups"]
    return {
        place: {**group, **{key: value for key, value in values.items() if key != PLACE}}
        for group, values in zip(groups, update.settings[0], strict=True)
        for place in group["params"]
    }


def _names(sandbox: Sandbox, optimizer: Optimizer) -> dict[int, str]:
    named = {parameter: name for name, parameter in sandbox.module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {place: named[parameter] for place, parameter in enumerate(parameters) if parameter in named}


def _is_whole(optimizer: Optimizer, entry: Entry) -> bool:
    keys = ("momentum_buffer",) if isinstance(optimizer, SGD) else ("exp_avg", "exp_avg_sq", "step")
    return all(isinstance(entry.get(key), Tensor) for key in keys)


def _weights_before(optimizer: Optimizer, group: Entry, entry: Entry, weights: Tensor) -> Tensor:
    now, rate = weights.double(), float(group["lr"])
    if isinstance(optimizer, SGD):
        before: Tensor = now + rate * entry["momentum_buffer"].double()
        return before.to(weights.dtype)
    step, (first, second) = float(entry["step"]), group["betas"]
    root = (entry["exp_avg_sq"].double() / (1.0 - second**step)).sqrt() + group["eps"]
    taken = rate * entry["exp_avg"].double() / (1.0 - first**step) / root
    shrunk = 1.0 - rate * group["weight_decay"] if isinstance(optimizer, AdamW) else 1.0
    before = (now + taken) / shrunk
    return before.to(weights.dtype)


def _emptied(entry: Entry) -> dict[str, Any]:
    """The state with zero averages, one step earlier; an update of it shows the part of its own gradient."""
    zeroed = {key: torch.zeros_like(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
    return zeroed | ({"step": entry["step"] - 1} if "step" in entry else {})


def _before(group: Entry, entry: Entry, fresh: Entry) -> dict[str, Any]:
    first, second = group.get("betas", (None, None))
    decays = {"momentum_buffer": group.get("momentum"), "exp_avg": first, "exp_avg_sq": second}
    out = dict(entry)
    for key, value in entry.items():
        if key == "step":
            out[key] = value - 1
        elif decay := decays.get(key):
            out[key] = ((value.double() - fresh[key].double()) / decay).to(value.dtype)
    return out
