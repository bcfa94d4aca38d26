"""Compare optimizers and schedulers after a resume with the checkpoint."""

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
"""Relative difference of two equal norms of a state: torch casts it to its parameter's dtype on loading, and bfloat16
has 8 bits; engineering choice."""
SAME_RATE: Final = 1e-6
"""… and of two equal learning rates, which are not cast."""

Plain = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NotRestored:
    """A state that differs from the checkpoint."""

    kind: str
    """`"optimizer_state"` or `"schedule"`."""
    detail: Plain
    """JSON-able: `optimizer`, `what`, `saved`, `restored` (numbers) and `text`."""


def summary(trainer: Trainer) -> Plain:
    """Summarise optimizers and schedulers in plain data, a few numbers each.

    Per optimizer: the learning rates and, per kind of state, how many parameters have it, how many have a non-zero one,
    and its norm. Per scheduler: its position. Waits for the device, so only for checkpoints and starts. Empty where a
    strategy shards the states.
    """
    is_sharded = any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers)
    if is_sharded or type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        return {}
    return {
        "optimizers": [_of_optimizer(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [_of_scheduler(config.scheduler) for config in trainer.lr_scheduler_configs],
    }


def not_restored(saved: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[NotRestored]:
    """Compare two summaries; empty for other optimizers or schedulers than the saved ones, an intended change.

    Args:
        saved: From the checkpoint.
        now: Of the run that resumes.
        names: Lightning's names of the optimizers.
    """
    pairs = _matching(saved, now, "optimizers", ("class", "parameters"))
    found = [one for name, (a, b) in zip(names, pairs, strict=False) if (one := _of_states(name, a, b)) is not None]
    schedulers = _matching(saved, now, "schedulers", ("class",))
    moved = [(a, b) for a, b in schedulers if a["last_epoch"] != b["last_epoch"]]
    rates = [(n, x, y) for n, (a, b) in zip(names, pairs, strict=False) for x, y in _rates(a, b)]
    if moved:
        found.append(_schedule_not_restored(*moved[0], rates, names))
    elif rates:
        found.append(_rate_changed(*rates[0]))
    return found


@torch.no_grad()
def _of_optimizer(optimizer: Optimizer) -> Plain:
    kept: dict[str, list[Tensor]] = {}
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and is_readable(value) and isinstance(key, str):
                kept.setdefault(key, []).append(torch.linalg.vector_norm(value.detach(), dtype=torch.float64).cpu())
    stacked = {key: torch.stack(norms) for key, norms in kept.items()}
    return {
        "class": type(optimizer).__name__,
        "parameters": sum(len(group["params"]) for group in optimizer.param_groups),
        "rates": [float(group["lr"]) for group in optimizer.param_groups if "lr" in group],
        "states": {
            key: {"held": len(n), "nonzero": int(n.count_nonzero()), "norm": float(torch.linalg.vector_norm(n))}
            for key, n in stacked.items()
        },
    }


def _of_scheduler(scheduler: object) -> Plain:
    place = getattr(scheduler, "last_epoch", None)
    return {"class": type(scheduler).__name__, "last_epoch": place if isinstance(place, int) else None}


def _matching(
    saved: Mapping[str, Any], now: Mapping[str, Any], what: str, same: Sequence[str]
) -> list[tuple[Plain, Plain]]:
    """Pairs of saved and present entries; empty unless all agree in the keys `same`."""
    a, b = saved.get(what, []), now.get(what, [])
    alike = len(a) == len(b) and all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in same)
    return list(zip(a, b, strict=True)) if alike else []


def _of_states(name: str, saved: Plain, now: Plain) -> NotRestored | None:
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
        how = f"{was['nonzero']} parameters had one in the checkpoint, {held['nonzero']} have one now"
    else:
        how = f"its norm was {was['norm']:.6g} in the checkpoint and is {held['norm']:.6g}"
    text = f"The state of {name} was not restored from the checkpoint ({keys}). For {key}, {how}."
    detail = {"optimizer": name, "what": [key for key, _, _ in differing], "parameters": saved["parameters"]}
    numbers = {"lost": max(fewer, 0), "saved": was["norm"], "restored": held["norm"], "text": text}
    return NotRestored(kind="optimizer_state", detail=detail | numbers)


def _is_other(was: Plain, held: Plain) -> bool:
    if (was["held"], was["nonzero"]) != (held["held"], held["nonzero"]):
        return True
    before, after = float(was["norm"]), float(held["norm"])
    return abs(before - after) > SAME_NORM * max(before, after)


def _rates(saved: Plain, now: Plain) -> list[tuple[float, float]]:
    pairs = zip(saved["rates"], now["rates"], strict=False)
    return [(a, b) for a, b in pairs if abs(a - b) > SAME_RATE * max(abs(a), abs(b))]


def _schedule_not_restored(
    was: Plain, held: Plain, rates: Sequence[tuple[str, float, float]], names: Sequence[str]
) -> NotRestored:
    text = f"{was['class']} was at {was['last_epoch']} in the checkpoint and continues from {held['last_epoch']}"
    detail: Plain = {"optimizer": names[0] if names else None, "what": ["schedule"]}
    if rates:
        name, before, after = rates[0]
        detail |= {"optimizer": name, "rate_saved": before, "rate_restored": after}
        text += f"; the learning rate was {before:.6g} and is {after:.6g}"
    numbers = {"saved": was["last_epoch"], "restored": held["last_epoch"], "text": f"{text}."}
    return NotRestored(kind="schedule", detail=detail | numbers)


def _rate_changed(name: str, before: float, after: float) -> NotRestored:
    text = f"The learning rate of {name} was {before:.6g} in the checkpoint and is {after:.6g} after the resume."
    detail = {"optimizer": name, "what": ["lr"], "rate_saved": before, "rate_restored": after}
    return NotRestored(kind="schedule", detail=detail | {"saved": before, "restored": after, "text": text})
