"""What a checkpoint held of optimizers and schedules, against what is there when the run goes on from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_spike.signals.subset import is_readable

SAME_NORM: Final = 1e-3
"""Relative difference of two norms of a whole state that still counts as the same: torch casts a state to its
parameter's dtype when it loads it, and bfloat16 keeps 8 bits."""
SAME_RATE: Final = 1e-6
"""… of two learning rates, which are copied as they are."""

Plain = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Something that is not as it was saved."""

    kind: str
    """`"optimizer_state"` or `"schedule"`."""
    detail: Plain
    """JSON-able: `optimizer`, `what`, `saved`, `restored` (numbers) and `text`."""


def summary(trainer: Trainer) -> Plain:
    """Of every optimizer the learning rates and, of each kind of state, how many parameters have it, how many of them other than all zero, and its norm; of every scheduler its place.

    Plain numbers, strings, lists and dicts, a few for each optimizer. Reads the states' norms, which waits for the
    device: for the time of a checkpoint or of a start, not for the loop. Empty where a strategy shards the states, for
    then none of the ranks has all of them.
    """
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy) or any(map(_is_sharded, trainer.optimizers)):
        return {}
    return {
        "optimizers": [_of_optimizer(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [_of_scheduler(config.scheduler) for config in trainer.lr_scheduler_configs],
    }


def lost(saved: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[Lost]:
    """Compare two summaries.

    Nothing where optimizers or schedulers are others than those that were saved, for then that is meant. Pure.

    Args:
        saved: From the checkpoint.
        now: Of the run as it is about to go on.
        names: Lightning's names of the optimizers.
    """
    pairs = _matching(saved, now, "optimizers", ("class", "parameters"))
    found = [one for name, (a, b) in zip(names, pairs, strict=False) if (one := _of_states(name, a, b)) is not None]
    schedulers = _matching(saved, now, "schedulers", ("class",))
    moved = [(a, b) for a, b in schedulers if a["last_epoch"] != b["last_epoch"]]
    rates = [(n, x, y) for n, (a, b) in zip(names, pairs, strict=False) for x, y in _rates(a, b)]
    if moved:
        found.append(_schedule_lost(*moved[0], rates, names))
    elif rates:
        found.append(_rate_changed(*rates[0]))
    return found


# -- what is there
# -------------------------------------------------------------------------------------------------------


def _is_sharded(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "consolidate_state_dict")


@torch.no_grad()
def _of_optimizer(optimizer: Optimizer) -> Plain:
    kept: dict[str, list[Tensor]] = {}
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and is_readable(value) and isinstance(key, str):
                kept.setdefault(key, []).append(torch.linalg.vector_norm(value.detach(), dtype=torch.float64).cpu())
    return {
        "class": type(optimizer).__name__,
        "parameters": sum(len(group["params"]) for group in optimizer.param_groups),
        "rates": [float(group["lr"]) for group in optimizer.param_groups if "lr" in group],
        "states": {key: _of_norms(torch.stack(norms)) for key, norms in kept.items()},
    }


def _of_norms(norms: Tensor) -> Plain:
    return {
        "held": norms.numel(),
        "nonzero": int(norms.count_nonzero()),
        "norm": float(torch.linalg.vector_norm(norms)),
    }


def _of_scheduler(scheduler: object) -> Plain:
    place = getattr(scheduler, "last_epoch", None)
    return {"class": type(scheduler).__name__, "last_epoch": place if isinstance(place, int) else None}


# -- compared
# ------------------------------------------------------------------------------------------------------------


def _matching(
    saved: Mapping[str, Any], now: Mapping[str, Any], what: str, same: Sequence[str]
) -> list[tuple[Plain, Plain]]:
    """Pairs of what was saved and what is there, where all of them are of the same make."""
    a, b = saved.get(what, []), now.get(what, [])
    alike = len(a) == len(b) and all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in same)
    return list(zip(a, b, strict=True)) if alike else []


def _of_states(name: str, saved: Plain, now: Plain) -> Lost | None:
    none = {"held": 0, "nonzero": 0, "norm": 0.0}
    differing = [
        (key, was, held) for key, was in saved["states"].items() if _is_other(was, held := now["states"].get(key, none))
    ]
    if not differing:
        return None
    key, was, held = min(differing, key=lambda d: d[2]["nonzero"] - d[1]["nonzero"])
    keys = ", ".join(key for key, _, _ in differing)
    fewer = was["nonzero"] - held["nonzero"]
    if fewer > 0:
        how = f"when the checkpoint was written {was['nonzero']} parameters had one, now {held['nonzero']}"
    else:
        how = f"its norm was {was['norm']:.6g} when the checkpoint was written and is {held['norm']:.6g}"
    text = f"The state of {name} was not restored as it was saved ({keys}): of {key} {how}."
    detail = {"optimizer": name, "what": [key for key, _, _ in differing], "parameters": saved["parameters"]}
    numbers = {"lost": max(fewer, 0), "saved": was["norm"], "restored": held["norm"], "text": text}
    return Lost(kind="optimizer_state", detail=detail | numbers)


def _is_other(was: Plain, held: Plain) -> bool:
    if (was["held"], was["nonzero"]) != (held["held"], held["nonzero"]):
        return True
    before, after = float(was["norm"]), float(held["norm"])
    return abs(before - after) > SAME_NORM * max(before, after)


def _rates(saved: Plain, now: Plain) -> list[tuple[float, float]]:
    pairs = zip(saved["rates"], now["rates"], strict=False)
    return [(a, b) for a, b in pairs if abs(a - b) > SAME_RATE * max(abs(a), abs(b))]


def _schedule_lost(was: Plain, held: Plain, rates: Sequence[tuple[str, float, float]], names: Sequence[str]) -> Lost:
    text = f"{was['class']} was at {was['last_epoch']} when the checkpoint was written and goes on from {held['last_epoch']}"
    detail: Plain = {"optimizer": names[0] if names else None, "what": ["schedule"]}
    if rates:
        name, before, after = rates[0]
        detail |= {"optimizer": name, "rate_saved": before, "rate_restored": after}
        text += f"; the learning rate was {before:.6g} and is {after:.6g}"
    numbers = {"saved": was["last_epoch"], "restored": held["last_epoch"], "text": f"{text}."}
    return Lost(kind="schedule", detail=detail | numbers)


def _rate_changed(name: str, before: float, after: float) -> Lost:
    text = f"The learning rate of {name} was {before:.6g} when the checkpoint was written and is {after:.6g} after the resume."
    detail = {"optimizer": name, "what": ["lr"], "rate_saved": before, "rate_restored": after}
    return Lost(kind="schedule", detail=detail | {"saved": before, "restored": after, "text": text})
