"""Examines one episode: the replay, then the experiments in the order of their value.

It measures; what the numbers mean is said in `diagnosis.judgement`, which is also asked where the next experiment
depends on the last one's result.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np
from torch import Tensor

from lightning_spike.diagnosis.judgement import (
    DOUBTFUL_PROBABILITY,
    EXAMINED_WEIGHTS_SHARE,
    ORDER_LEFT,
    SUPPORTING_SHARE,
    SplitVerdict,
    p_chronic,
    split_verdict,
    verdict_of,
)
from lightning_spike.errors import CannotReplay
from lightning_spike.experiments import (
    Attribution,
    Cooldown,
    Cost,
    Experiments,
    FirstNonFinite,
    Remedy,
    Replay,
    SampleExchange,
    SampleOrder,
    Split,
    StepSize,
    joined,
)
from lightning_spike.lab.experiments.attribution import attribute, recent_baselines
from lightning_spike.lab.experiments.cooldown_test import MAX_CONTROLS, cooldown_test
from lightning_spike.lab.experiments.damage_location import damage_on_the_way
from lightning_spike.lab.experiments.first_nonfinite import first_nonfinite
from lightning_spike.lab.experiments.outside import came_from_outside, mode_change, outside_change
from lightning_spike.lab.experiments.remedies import try_remedies
from lightning_spike.lab.experiments.sample_exchange import exchange_samples, name_samples, passes_to_name
from lightning_spike.lab.experiments.sample_order import is_streak, reorder
from lightning_spike.lab.experiments.split import batch_noise, split
from lightning_spike.lab.experiments.step_size import step_size
from lightning_spike.lab.measure.measure import measure, measure_single_samples
from lightning_spike.lab.replay.evaluate import control_sample_size, log_scale, losses_under
from lightning_spike.lab.replay.reproduce import Reproduction, go_on, reproduce
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.records import EpisodeKind
from lightning_spike.sandbox.budget import FULL_STEPS, Allowance
from lightning_spike.sandbox.isolation import Sandbox, isolated
from lightning_spike.sandbox.state import TrainState

MIN_DATA_SHARE: Final = 0.5
"""Share of the jump due to the batch below which its neighbours are examined before the updates; engineering choice."""
UNCHANGED_COMPUTATION_SHARE: Final = 0.5
"""Share of the control batches' rise that the snapshot's own batch must show for a changed computation;
engineering choice."""
MIN_RATE_JUMP: Final = 2.0
"""Ratio to the previous rate from which updates are examined before the sample order,
as in `detectors.learning_rate`."""
TRIAGE_CONTROLS: Final = 2
"""Control batches in a triage: five forward passes in all; engineering choice."""
WHICH_UPDATE: Final = "which update did the damage, and what about it"
ONE_UPDATE: Final = {"updates": 3, "passes": 24}
"""Minimum cost of locating the update and repeating it without each of two factors and without both."""

Ask = Callable[[], tuple[Remedy, ...]]


def examine(scene: Scene) -> Experiments:
    """Examines one episode in full, without a trace in the training. Blocks.

    First come the replay, batch against weights and the attribution of the damage; then step sizes, measurements,
    samples, their order, and at last the remedies. What no longer fits into 40 training steps' worth of time
    (`sandbox.budget`) is left out, and the `cost` says so.

    Raises:
        CannotReplay: It cannot be examined; the message says why.
        Exception: Whatever the module's own code raises when it is run again. The training is untouched all the same.
    """
    with isolated(scene.trainer, scene.module, with_optimizers=True, ranks=scene.ranks) as sandbox:
        sandbox.allowance = Allowance(FULL_STEPS)
        replay, failure = _reproduced(scene, sandbox, None)
        found = _examined(scene, sandbox, replay, failure)
        other = scene.elsewhere() if split_verdict(found) is SplitVerdict.NOISE else None
        if other is not None:
            second = _examined(other, sandbox, *_reproduced(other, sandbox, replay))
            found = found if split_verdict(second) is SplitVerdict.NOISE else second
        left_out = tuple(sandbox.allowance.left_out)
        cost = Cost(steps=sandbox.steps, updates=sandbox.updates, worth=sandbox.cost, left_out=left_out)
    return dataclasses.replace(found, cost=cost)


def triage(scene: Scene) -> Experiments:
    """Splits the jump with few batches and no replay: is the batch's loss high under healthy weights too?

    Costs some three training steps (`python benchmarks/lab.py`, the column triage).

    Raises:
        CannotReplay: As `examine`, and other exceptions too.
    """
    few = dataclasses.replace(scene, controls=min(scene.controls, TRIAGE_CONTROLS))
    with isolated(scene.trainer, scene.module, ranks=scene.ranks) as sandbox:
        parts = _split(few, sandbox, None)
    replay = _replay_record(scene, None, "only a triage was made, for want of budget")
    return Experiments(episode=scene.episode.id, extent="triage", replay=replay, split=parts)


def _examined(scene: Scene, sandbox: Sandbox, replay: Reproduction | None, failure: str | None) -> Experiments:
    """The experiments on one batch of the episode."""
    empty = Experiments(episode=scene.episode.id)
    if replay is not None and replay.differs_at is not None:
        change = mode_change(scene, replay, sandbox)
        if change is None and came_from_outside(scene, replay):
            change = outside_change(scene, replay, sandbox)
        if change is not None:
            return dataclasses.replace(empty, replay=_replay_record(scene, replay, None), outside_change=change)
        failure = f"the replay differs from the training from batch {replay.differs_at} on"
        replay = None
    found = dataclasses.replace(
        empty,
        replay=_replay_record(scene, replay, failure),
        first_nonfinite=_first_nonfinite(scene, sandbox, replay),
        split=_split(scene, sandbox, replay),
    )
    return found if replay is None else joined(found, _further(scene, sandbox, replay, found))


def _further(scene: Scene, sandbox: Sandbox, replay: Reproduction, found: Experiments) -> Experiments:
    """The experiments after the split."""
    empty = Experiments(episode=found.episode)
    if found.split is None:
        return empty
    verdict = verdict_of(found.split)
    if verdict is SplitVerdict.COMPUTATION:
        return _measured(scene, sandbox, replay, found.split, None)
    if replay.reached != scene.target_ordinal:
        return empty
    if verdict is SplitVerdict.NOISE:
        return dataclasses.replace(empty, step_size=step_size(sandbox, replay.updates_replayed, replay.end))
    return _attributed(scene, sandbox, replay, found.split)


def _replay_record(scene: Scene, replay: Reproduction | None, failure: str | None) -> Replay:
    reached = replay is not None and replay.reached == scene.target_ordinal
    return Replay(
        batches=len(scene.stretch) - 1,
        recorded=scene.recorded,
        replayed=replay.replayed if replay is not None and reached else None,
        differs_at=None if replay is None else replay.differs_at,
        failure=failure,
    )


# -- replay ------------------------------------------------------------------------------------------------------------


def _reproduced(scene: Scene, sandbox: Sandbox, known: Reproduction | None) -> tuple[Reproduction | None, str | None]:
    """The replay from the snapshot to the onset, continued from a known one; `None` and a reason if impossible."""
    sandbox.rewind()
    stretch = scene.stretch, scene.settings, scene.losses
    try:
        with sandbox.ranks.stage():
            further = None if known is None else go_on(sandbox, known, *stretch)
            return further or reproduce(sandbox, TrainState.of(scene.snapshot), *stretch), None
    except CannotReplay as reason:
        return None, str(reason)


# -- first non-finite value --------------------------------------------------------------------------------------------


def _first_nonfinite(scene: Scene, sandbox: Sandbox, replay: Reproduction | None) -> FirstNonFinite | None:
    if scene.episode.kind is not EpisodeKind.NONFINITE and math.isfinite(scene.recorded):
        return None
    reached = scene.target_ordinal if replay is None else replay.reached
    entry = next((e for e in scene.entries if e.at.ordinal == reached), scene.spike)
    old = _first_nonfinite_under(sandbox, scene.snapshot.model, entry)
    new = old if replay is None else _first_nonfinite_under(sandbox, replay.weights, entry)
    found = new or old
    return None if found is None else dataclasses.replace(found, with_healthy_weights=old is not None)


def _first_nonfinite_under(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> FirstNonFinite | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    return first_nonfinite(sandbox, entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at)


# -- batch against weights ---------------------------------------------------------------------------------------------


def _split(scene: Scene, sandbox: Sandbox, replay: Reproduction | None) -> Split:
    parts = _parts(scene, sandbox, replay, scene.losses)
    if parts.computation < SUPPORTING_SHARE or not _computes_as_before(scene, sandbox, parts):
        return parts
    return _parts(scene, sandbox, replay, {scene.target_ordinal: scene.recorded})


def _parts(scene: Scene, sandbox: Sandbox, replay: Reproduction | None, losses: Mapping[int, float]) -> Split:
    return split(
        sandbox,
        scene.spike,
        scene.ordinary(),
        old=scene.snapshot.model,
        new=replay.weights if replay is not None and replay.reached == scene.target_ordinal else None,
        losses=losses,
        scatter=batch_noise(scene.losses_before()),
    )


def _computes_as_before(scene: Scene, sandbox: Sandbox, parts: Split) -> bool:
    """Whether the snapshot's own batch still has its recorded loss.

    Other batches met other weights, and steps that throw weights about make their losses differ.
    """
    first = scene.stretch[0]
    recorded = scene.losses.get(first.at.ordinal, math.nan)
    if first.at.ordinal == scene.target_ordinal or not math.isfinite(recorded):
        return False
    values = np.array([recorded, *losses_under(sandbox, scene.snapshot.model, [first], like=scene.spike, held=True)])
    before, now = log_scale(values)(values)
    return bool(now - before < UNCHANGED_COMPUTATION_SHARE * parts.computation * parts.jump)


# -- what the parts are made of ----------------------------------------------------------------------------------------


def _attributed(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> Experiments:
    """Attributes the batch's and the weights' shares of the jump, if each is large enough."""
    # A streak of batches none of which is bad alone: their order explains more than the updates do.
    order_first = parts.data < MIN_DATA_SHARE and not _rate_jumped(scene, replay)
    order = _order_of_samples(scene, sandbox, replay, parts) if order_first else None
    asks_damage = parts.weights_part >= EXAMINED_WEIGHTS_SHARE and (order is None or order.left > ORDER_LEFT)
    if asks_damage and order is not None:
        asks_damage = sandbox.affords(WHICH_UPDATE, **ONE_UPDATE)
    damage, ask_remedies = _damage(scene, sandbox, replay) if asks_damage else (None, None)
    located = None if damage is None else damage.ordinal
    steps = None
    if _asks_step_size(parts, damage):
        steps = step_size(sandbox, replay.updates_replayed, replay.end, but=located)
    found = Experiments(
        episode=scene.episode.id,
        step_size=steps,
        cooldown=_cooldown(scene, sandbox, replay, parts, steps),
        attribution=damage,
    )
    found = joined(found, _measured(scene, sandbox, replay, parts, located))
    exchange = _exchange_of_samples(scene, sandbox, replay, parts)
    order = order if order_first else _order_of_samples(scene, sandbox, replay, parts)
    found = dataclasses.replace(found, sample_exchange=exchange, sample_order=order)
    if parts.batch_part >= SUPPORTING_SHARE:
        found = joined(found, measure_single_samples(scene, sandbox))
    return found if ask_remedies is None else dataclasses.replace(found, remedies=ask_remedies())


def _cooldown(
    scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split, steps: StepSize | None
) -> Cooldown | None:
    """The cooldown test, where the batch has a part and steps may be too long all the time."""
    is_doubtful = steps is None or p_chronic(steps) >= DOUBTFUL_PROBABILITY
    if parts.batch_part < SUPPORTING_SHARE or not is_doubtful:
        return None
    updates = sum(len(one.update.entries) for one in replay.updates_replayed)
    if not sandbox.affords("the batch under cooled-down weights", updates=updates, passes=1 + MAX_CONTROLS):
        return None
    return cooldown_test(sandbox, replay.updates_replayed, scene.spike, scene.ordinary(), excess=parts.excess)


def _asks_step_size(parts: Split, damage: Attribution | None) -> bool:
    """Whether it matters if steps are too long all the time.

    Not where the batch has no part, and the learning rate explains the damage of the located update.
    """
    if damage is None or parts.batch_part >= SUPPORTING_SHARE:
        return True
    return _share_of(damage, "learning_rate") < 1.0 - SUPPORTING_SHARE


def _share_of(damage: Attribution, group: str) -> float:
    return sum(share.share for share in damage.shares if share.group == group)


def _measured(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split, located: int | None) -> Experiments:
    blames_weights = parts.weights_part >= SUPPORTING_SHARE
    return measure(scene, sandbox, replay, located=located, blames_weights=blames_weights)


def _rate_jumped(scene: Scene, replay: Reproduction) -> bool:
    """Whether one of the replayed updates had a rate far above that of the update before it.

    Then updates are examined first.
    """
    kept = {one.update.ordinal for one in replay.updates_replayed}
    first = [
        (k, float(steps[0][0].get("lr", 0.0))) for k, steps in sorted(scene.settings.items()) if steps and steps[0]
    ]
    return any(k in kept and rate > MIN_RATE_JUMP * before > 0.0 for (_, before), (k, rate) in pairwise(first))


def _damage(scene: Scene, sandbox: Sandbox, replay: Reproduction) -> tuple[Attribution | None, Ask | None]:
    """The attribution of the damaging update and a function that tries remedies; `None` without damage."""
    controls = _controls(scene, sandbox, replay)
    found = damage_on_the_way(sandbox, replay, controls, like=scene.spike)
    if found is None or found.log_rise <= 0:
        return None, None
    baselines = recent_baselines(scene, replay, found.first, controls)
    damaging, scatter = replay.updates_replayed[found.first : found.last + 1], batch_noise(scene.losses_before())
    shared = attribute(sandbox, found, damaging, baselines, controls, like=scene.spike, scatter=scatter)
    by_state = shared.intrinsic + _share_of(shared, "optimizer") >= SUPPORTING_SHARE
    ask = partial(try_remedies, sandbox, found, damaging, baselines, controls, like=scene.spike, empties_state=by_state)
    return shared, ask


def _controls(scene: Scene, sandbox: Sandbox, replay: Reproduction) -> Sequence[RingEntry]:
    """The control batches that damage is measured on, chosen by their losses in the split."""
    controls = scene.ordinary()
    old, new = (
        losses_under(sandbox, w, controls, like=scene.spike, held=True) for w in (scene.snapshot.model, replay.weights)
    )
    scale = log_scale(old, new)
    return control_sample_size(controls, scale(new) - scale(old))


def _exchange_of_samples(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> SampleExchange | None:
    """The batch with its outlier samples exchanged, if it has a share of the jump; not with several ranks."""
    # The user's step may fail on mixed batches; the other experiments remain.
    with contextlib.suppress(Exception):
        needed, ordinary = passes_to_name(scene.spike), scene.ordinary()
        question = "the batch without the samples that stand out"
        if not _batch_has_share(sandbox, parts) or needed > 1 + len(ordinary):
            return None
        if not sandbox.affords(question, passes=1, gradients=needed):
            return None
        named = name_samples(sandbox, scene.snapshot.model, scene.spike, ordinary)
        return exchange_samples(sandbox, replay.weights, scene.spike, ordinary, positions=named, excess=parts.excess)
    return None


def _order_of_samples(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> SampleOrder | None:
    """A streak with its samples in another order, if the batch has a share of the jump; not with several ranks."""
    with contextlib.suppress(Exception):
        if _batch_has_share(sandbox, parts) and is_streak(scene):
            return reorder(scene, sandbox, replay.updates_replayed, updates_since(scene, sandbox))
    return None


def _batch_has_share(sandbox: Sandbox, parts: Split) -> bool:
    return parts.batch_part >= SUPPORTING_SHARE and sandbox.trainer.world_size == 1
