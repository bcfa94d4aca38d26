"""What would have helped: the update once more with a safer setting. It says nothing about what was wrong."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.state_copy import copy_module
from lightning_spike.lab.evaluate import log_scale, losses_under
from lightning_spike.lab.factors.factor import Around
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.locate import Damage
from lightning_spike.lab.reproduce import Leg
from lightning_spike.lab.update import Update, make_update

__all__ = ["Remedy", "try_remedies"]

LOWER: Final = 0.1
"""Factor on the learning rate (science.md 2b.4)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One safer setting, and how much of the damage it takes away."""

    remedy: str
    """`"lower_rate"`, `"clip"`, `"reset_state"` or `"float32"`."""
    value: float | None
    """The setting, where it is a number: the factor on the rate, the norm that gradients are clipped to."""
    repaired: float
    """Share of the damage that is gone: 1 for all of it, below 0 if it got worse."""


def try_remedies(
    bench: Bench, damage: Damage, leg: Leg, around: Around, controls: Sequence[RingEntry], *, like: RingEntry
) -> tuple[Remedy, ...]:
    """Make the update that did the damage with each remedy by itself, the most helpful first.

    A tenth of the learning rate takes most damage away, whatever made it (75 of 75, science.md 2b.6): these are remedies to report as such, never a test of a cause.
    Each costs one update and the evaluation of the controls.

    Args:
        bench: Inside `isolated(..., with_optimizers=True)`.
        damage: The update's.
        leg: The update.
        around: What was normal around it.
        controls: The batches that `damage` was measured on.
        like: Whose random state all evaluations are given.
    """
    found = [
        Remedy(remedy=name, value=value, repaired=_repaired(bench, update, leg, damage, controls, like))
        for name, value, update in _safer(leg, around)
    ]
    return tuple(sorted(found, key=lambda remedy: -remedy.repaired))


def _safer(leg: Leg, around: Around) -> list[tuple[str, float | None, Update]]:
    update = leg.update
    out: list[tuple[str, float | None, Update]] = [
        ("lower_rate", LOWER, dataclasses.replace(update, settings=tuple(_slower(step) for step in update.settings)))
    ]
    usual = [_norm(earlier) for earlier in around.legs[:-1] if earlier.made.gradients]
    if usual and _norm(leg) > (healthy := statistics.median(usual)):
        out.append(("clip", healthy, dataclasses.replace(update, clip=healthy)))
    if any(state["state"] for state in leg.before.optimizers):
        empty = [{**state, "state": {}} for state in leg.before.optimizers]
        out.append(("reset_state", None, dataclasses.replace(update, optimizers=empty)))
    if around.is_mixed:
        out.append(("float32", None, dataclasses.replace(update, in_float32=True)))
    return out


def _repaired(
    bench: Bench, update: Update, leg: Leg, damage: Damage, controls: Sequence[RingEntry], like: RingEntry
) -> float:
    bench.rewind()
    leg.before.load(bench)
    if make_update(bench, update).spoilt_at is not None:
        return 0.0
    after = losses_under(bench, copy_module(bench.module), controls, like=like)
    scale = log_scale(damage.before, damage.after)
    left = float((scale(after) - scale(damage.before)).mean())
    return 1.0 - left / damage.log_rise if damage.log_rise > 0 else 0.0


def _slower(step: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{**group, "lr": group["lr"] * LOWER} if "lr" in group else group for group in step]


def _norm(leg: Leg) -> float:
    """L2 norm of all gradients of an update, before clipping."""
    squares = [float((g.to_dense() if g.is_sparse else g).double().square().sum()) for g in leg.made.gradients.values()]
    return math.sqrt(sum(squares))
