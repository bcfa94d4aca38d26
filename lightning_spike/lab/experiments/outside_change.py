"""Finds an outside change and the batch before which it was made.

The training's own states, rewound back until they meet those of the replay.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lightning_spike.diagnosis.judgement import CONFIRMING_SHARE
from lightning_spike.experiments import ChangeKind, TensorDifference
from lightning_spike.lab.replay.compare import differences
from lightning_spike.lab.replay.loss_after_updates import loss_after_updates
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.replay.rewind_updates import SECOND, RewoundState, can_rewind_updates, rewind_updates
from lightning_spike.lab.replay.update import Update
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MAX_UNDONE_UPDATES: Final = 8
"""Maximum number of undone updates; engineering choice. Each costs a training step and multiplies the rounding error of
the momentum by 1 / beta."""
EARLIER_UPDATES: Final = 2
"""Updates before the first different loss in which the change may have been made; engineering choice."""
MAX_EQUAL_GAP: Final = 0.01
"""Share of the later gap up to which two states agree; engineering choice. Undoing an update leaves a rounding error of
about 1e-6 of the weights."""
MAX_UNKNOWN_SHARE: Final = 0.5
"""Share of the weights that may be unknown; engineering choice."""

FIRST: Final = "exp_avg"
"""The momentum of Adam."""
MAX_MOMENTUM_GAP: Final = 0.5
"""Share of its size up to which the momentum may differ; engineering choice. Some weights behind the next gradient are
uncertain; a changed gradient differs by many times that."""
MIN_MOVED_ELEMENTS: Final = 32
"""Elements that must have moved differently for their directions to be compared; engineering choice."""
ROUNDING_TOLERANCE: Final = 1e-5
"""Share of a weight up to which a difference may be rounding; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocatedChange:
    """A change that explains how the run differs from its replay."""

    kind: ChangeKind
    """What was changed; `"result"` where batch, random state and weights were those of the replay and the loss came out
    another all the same. A momentum by itself cannot be told from the gradient that was added to it, unless it is its
    old self times a number."""
    ordinal: int
    """The batch before whose forward pass (for a gradient: after it) it was made, and not before the last update that
    both have alike."""
    different: tuple[TensorDifference, ...]
    """The tensors that it changed, the most first."""
    loss: float | None
    """Of the struck batch, in a replay with nothing but this change put in; `None` for a result: there is nothing to
    put in."""


def change_from_outside(
    scene: Scene,
    replay: Reproduction,
    sandbox: Sandbox,
    *,
    live: TrainState,
    caught_up: TrainState,
    updates: Sequence[Update],
) -> LocatedChange | None:
    """Undoes updates back to where training and replay differ, and finds whether weights or optimizer state changed.

    A write between two updates into the weights leaves the optimizer's state as it is until the next update, and one
    into the state leaves the weights; so the kind that differs alone is the one that was written into, seen or not
    (writes through `.data` are not). The change is then put into the replay by itself: only where that brings the jump
    back is it believed. Costs a training step for each update undone, some four, and the way to the struck batch.

    Args:
        scene: The episode.
        replay: Its replay, which differs.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        live: The state at present.
        caught_up: The replay taken on to the present.
        updates: Those from the struck batch's on to the present, in order.

    Returns:
        `None` where updates cannot be undone, the two states do not part one after the other, or the change does not
        explain the loss.
    """
    first = replay.differs_at
    if first is None or not can_rewind_updates(sandbox):
        return None
    way = [*(leg.update for leg in replay.updates_replayed), *updates]
    place = next((k for k, update in enumerate(way) if update.ordinal >= first), len(way))
    undone = way[max(place - EARLIER_UPDATES, 0) :]
    scale = _gaps(sandbox, live, caught_up)
    if len(undone) > MAX_UNDONE_UPDATES or not all(math.isfinite(gap) for gap in scale.values()):
        return None
    states = {leg.before.at.ordinal: leg.before for leg in replay.updates_replayed}
    states |= dict.fromkeys((replay.reached, *(u.entries[0].at.ordinal for u in updates[:1])), replay.end)
    like = {u.entries[0].at.ordinal: states.get(u.entries[0].at.ordinal, replay.end) for u in undone}
    for rewound in rewind_updates(sandbox, undone, live, like):
        start = rewound.state.at.ordinal
        actual = _with_sure_weights(rewound, states[start]) if start in states and start <= first else None
        if actual is None:
            continue
        gaps = _gaps(sandbox, actual, states[start])
        alike = {kind: gap <= MAX_EQUAL_GAP * scale[kind] for kind, gap in gaps.items()}
        before = _before(replay, states[start])
        if not alike["weights"] and before is not None and _is_longer_step(sandbox, before, states[start], actual):
            alike = {"weights": False, "optimizer": True}
        if any(alike.values()):
            return None if all(alike.values()) else _confirmed(scene, replay, sandbox, states[start], actual, of=alike)
        scale = {kind: max(gap, scale[kind]) for kind, gap in gaps.items()}
    return None


def _with_sure_weights(rewound: RewoundState, healthy: TrainState) -> TrainState | None:
    """The state with unknown weights taken from the replay; `None` if most are unknown.

    To be alike would mean nothing.
    """
    unsure, count = (
        sum(float(m.sum()) for m in rewound.unsure.values()),
        sum(m.numel() for m in rewound.unsure.values()),
    )
    if unsure > MAX_UNKNOWN_SHARE * count:
        return None
    taken = {n: torch.where(m, healthy.weights[n], rewound.state.weights[n]) for n, m in rewound.unsure.items()}
    return dataclasses.replace(rewound.state, weights={**rewound.state.weights, **taken})


def _confirmed(
    scene: Scene,
    replay: Reproduction,
    sandbox: Sandbox,
    healthy: TrainState,
    actual: TrainState,
    *,
    of: Mapping[str, bool],
) -> LocatedChange | None:
    """The replay with what is not alike as the training had it; all else as it is."""
    if of["weights"] and healthy.at.ordinal == replay.differs_at == replay.reached:
        return LocatedChange(kind="result", ordinal=replay.reached, different=(), loss=None)
    if all(of.values()):
        return None
    ordinal = healthy.at.ordinal
    if of["weights"]:
        changed = dataclasses.replace(healthy, optimizers=actual.optimizers)
        kind = _kind_of_state(healthy, actual)
    else:
        parameters = {name: actual.weights[name] for name, _ in sandbox.module.named_parameters()}
        changed, kind = dataclasses.replace(healthy, weights={**healthy.weights, **parameters}), "weights"
        before = _before(replay, healthy)
        if before is not None and _is_longer_step(sandbox, before, healthy, actual):
            kind, ordinal = "optimizer", before.at.ordinal
    updates = [leg.update for leg in replay.updates_replayed if leg.update.entries[0].at.ordinal >= healthy.at.ordinal]
    after = loss_after_updates(sandbox, changed, updates, [scene.spike], like=scene.spike)
    loss = math.inf if after is None else float(after[0])
    if not _explains(loss, scene.recorded, replay.replayed):
        return None
    different = tuple(d for d in differences(changed, healthy) if d.relative > MAX_EQUAL_GAP)
    return LocatedChange(kind=kind, ordinal=ordinal, different=different, loss=loss)


def _explains(loss: float, recorded: float, replayed: float) -> bool:
    if not math.isfinite(recorded):
        return not math.isfinite(loss)
    return math.isfinite(loss) and abs(loss - recorded) <= (1.0 - CONFIRMING_SHARE) * abs(recorded - replayed)


# -- the state or the gradient -----------------------------------------------------------------------------------------


def _kind_of_state(healthy: TrainState, actual: TrainState) -> ChangeKind:
    """Undoing the update took out the gradient that the replay has.

    Had the training another one, that is left in the averages.
    """
    averages = _averages(healthy, actual)
    return "optimizer" if all(_is_multiple(now, then) for then, now in averages.values()) else "momentum_or_gradient"


def _averages(*states: TrainState) -> dict[str, list[Tensor]]:
    """All tensors of each state under one name as one row, float64."""
    held = [state.optimizers[0]["state"] for state in states]
    places = sorted(set.intersection(*(set(entries) for entries in held)))
    keys = [key for key, value in held[0][places[0]].items() if key != "step" and isinstance(value, Tensor)]
    return {key: [torch.cat([of[k][key].double().flatten() for k in places]) for of in held] for key in keys}


def _is_multiple(now: Tensor, then: Tensor) -> bool:
    sizes = float(now.norm() * then.norm())
    return sizes == 0.0 or abs(float(now @ then)) / sizes > 1.0 - MAX_EQUAL_GAP


# -- the weights or the second moments ---------------------------------------------------------------------------------


def _before(replay: Reproduction, state: TrainState) -> TrainState | None:
    """The state before the update that led to this one."""
    states = [*(leg.before for leg in replay.updates_replayed), replay.end]
    place = next((k for k, one in enumerate(states) if one is state), 0)
    return states[place - 1] if place else None


def _is_longer_step(sandbox: Sandbox, before: TrainState, healthy: TrainState, actual: TrainState) -> bool:
    """Whether the weights are where the last update's own step leads, only farther.

    In each element that moved by more than twice as much the direction is the replay's.

    That is what second moments do that were too small, with a momentum as in the replay: they are all that an element's
    step of Adam is divided by, and a large gradient afterwards drowns them, so that they cannot be had by undoing it.
    Somebody who writes into weights goes either way.
    """
    kept = dict.fromkeys((SECOND, FIRST), 0.0)
    for key in kept:
        pairs = [p for k, p in _pairs(actual.optimizers[0]["state"], healthy.optimizers[0]["state"]) if k == key]
        kept[key] = _gap(pairs) if pairs else math.inf
    if not kept[FIRST] <= MAX_MOMENTUM_GAP or kept[SECOND] == math.inf:
        return False
    along = count = 0
    for name, _ in sandbox.module.named_parameters():
        then = before.weights[name].double()
        usual, taken = healthy.weights[name].double() - then, actual.weights[name].double() - then
        other = (taken - usual).abs() > torch.maximum(usual.abs(), ROUNDING_TOLERANCE * then.abs())
        along += int((other & (taken * usual > 0.0)).sum())
        count += int(other.sum())
    return count >= MIN_MOVED_ELEMENTS and along >= (1.0 - MAX_EQUAL_GAP) * count


# -- how far apart -----------------------------------------------------------------------------------------------------


def _gaps(sandbox: Sandbox, a: TrainState, b: TrainState) -> dict[str, float]:
    """Relative distance of two states, by kind.

    For optimizer states the largest of the relative gaps of what they keep.
    """
    names = [name for name, _ in sandbox.module.named_parameters() if name in a.weights and name in b.weights]
    weights = _gap([(a.weights[name], b.weights[name]) for name in names])
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, pair in _pairs(a.optimizers[0]["state"], b.optimizers[0]["state"]):
        kept.setdefault(key, []).append(pair)
    return {"weights": weights, "optimizer": max((_gap(pairs) for pairs in kept.values()), default=0.0)}


def _pairs(
    a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for place in a.keys() & b.keys():
        for key, value in a[place].items():
            if key != "step" and isinstance(value, Tensor) and isinstance(b[place].get(key), Tensor):
                yield key, (value, b[place][key])


def _gap(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """L2 norm of the differences over that of the second tensors."""
    gap = sum(float((a.double() - b.double().to(a.device)).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    if size == 0:
        return math.inf if gap > 0 else 0.0
    return math.sqrt(gap / size)
