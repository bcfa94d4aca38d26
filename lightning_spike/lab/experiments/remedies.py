"""Remedies: the damaging update repeated with a safer setting. A remedy is no evidence of the cause."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Final

from lightning_spike.experiments import Remedy, RemedyName
from lightning_spike.lab.experiments.damage_location import Damage
from lightning_spike.lab.experiments.factors import Baselines
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.loss_after_updates import at_rate, loss_after_updates
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

LOWER_RATE: Final = 0.1
"""Factor on the learning rate (science.md 2b.4)."""
MAX_CONTROLS: Final = 2
"""Ordinary batches that a remedy is tried on: what it is asked is whether it helps, and a difference of pairs tells;
engineering choice."""


def try_remedies(
    sandbox: Sandbox,
    damage: Damage,
    updates_replayed: Sequence[ReplayedUpdate],
    baselines: Baselines,
    controls: Sequence[RingEntry],
    *,
    like: RingEntry,
    empties_state: bool = True,
) -> tuple[Remedy, ...]:
    """Repeats the damaging updates with each remedy alone; returns the most helpful first.

    A tenth of the learning rate takes most damage away, whatever made it (75 of 75, science.md 2b.6): these are
    remedies to report as such, never a test of a cause. Each costs as many updates and the evaluation of two control
    batches; what does not fit into the sandbox's allowance is left out.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        damage: Theirs.
        updates_replayed: The updates that did it.
        baselines: What was normal before the first of them.
        controls: The batches that `damage` was measured on.
        like: Whose random state all evaluations are given.
        empties_state: Try an empty optimizer state too.
    """
    few = dataclasses.replace(damage, before=damage.before[:MAX_CONTROLS], after=damage.after[:MAX_CONTROLS])
    if few.log_rise > 0:
        damage, controls = few, controls[:MAX_CONTROLS]
    made, tried = sum(len(leg.update.entries) for leg in updates_replayed), len(controls)
    found = [
        Remedy(remedy=name, value=value, repaired=_repaired(sandbox, updates, updates_replayed, damage, controls, like))
        for name, value, updates in _safer(updates_replayed, baselines, empties_state=empties_state)
        if sandbox.affords("what would have helped", updates=made, passes=tried)
    ]
    return tuple(sorted(found, key=lambda remedy: -remedy.repaired))


def _safer(
    updates_replayed: Sequence[ReplayedUpdate], baselines: Baselines, *, empties_state: bool
) -> list[tuple[RemedyName, float | None, list[Update]]]:
    updates = [leg.update for leg in updates_replayed]
    slower = [at_rate(update, LOWER_RATE) for update in updates]
    out: list[tuple[RemedyName, float | None, list[Update]]] = [("lower_rate", LOWER_RATE, slower)]
    usual = [_norm(earlier) for earlier in baselines.updates_replayed[:-1] if earlier.made.gradients]
    if usual and max(map(_norm, updates_replayed)) > (healthy := statistics.median(usual)):
        out.append(("clip", healthy, [dataclasses.replace(u, clip=healthy) for u in updates]))
    if empties_state and any(state["state"] for state in updates_replayed[0].before.optimizers):
        empty = [{**state, "state": {}} for state in updates_replayed[0].before.optimizers]
        out.append(("reset_state", None, [dataclasses.replace(updates[0], optimizers=empty), *updates[1:]]))
    if baselines.is_mixed:
        out.append(("float32", None, [dataclasses.replace(u, in_float32=True) for u in updates]))
    return out


def _repaired(
    sandbox: Sandbox,
    updates: Sequence[Update],
    updates_replayed: Sequence[ReplayedUpdate],
    damage: Damage,
    controls: Sequence[RingEntry],
    like: RingEntry,
) -> float:
    after = loss_after_updates(sandbox, updates_replayed[0].before, updates, controls, like=like)
    if after is None:
        return 0.0
    scale = log_scale(damage.before, damage.after)
    left = float((scale(after) - scale(damage.before)).mean())
    return 1.0 - left / damage.log_rise if damage.log_rise > 0 else 0.0


def _norm(leg: ReplayedUpdate) -> float:
    """L2 norm of all gradients of an update, before clipping."""
    squares = [float((g.to_dense() if g.is_sparse else g).double().square().sum()) for g in leg.made.gradients.values()]
    return math.sqrt(sum(squares))
