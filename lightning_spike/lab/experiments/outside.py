"""Measures a change from outside the training step that caused the loss jump and is missing in the replay."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.diagnosis.judgement import CONFIRMING_SHARE
from lightning_spike.errors import CannotReplay
from lightning_spike.experiments import OutsideChange, OutsideWrite
from lightning_spike.lab.experiments.outside_change import change_from_outside
from lightning_spike.lab.replay.compare import differences
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.reproduce import Reproduction, is_same, reproduce
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MIN_EQUAL_BATCHES: Final = 3
"""Batches that must be reproduced before a difference is an outside change; engineering choice. A computation that is
not reproducible differs from the start."""
MAX_TENSORS: Final = 8
"""Maximum number of listed tensors; engineering choice."""
RECENT_LOSSES: Final = 16
"""Losses before the onset whose median is the normal loss; engineering choice."""


def came_from_outside(scene: Scene, replay: Reproduction) -> bool:
    """Whether a replay that differs from the training shows an outside change: a normal loss, or a recorded write."""
    return _comes_out_healthy(scene, replay) or bool(_writes(scene, replay))


def outside_change(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> OutsideChange:
    """Returns the change: the loss of the replay, the recorded writes, and the tensors that differ now.

    The replay is taken on to the present for that, with all updates that the training has made since; and the training
    is rewound to where it left the replay, where that can be done (`change_from_outside`). The replay is the run with
    the change undone: what of the jump it does not have is due to the change (`repaired`).

    Args:
        scene: The episode.
        replay: Its replay.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
    """
    sandbox.rewind()
    live = TrainState.take(sandbox, scene.entries[-1].at)
    updates = updates_since(scene, sandbox)
    caught_up = _caught_up(scene, replay, sandbox, updates)
    change = change_from_outside(scene, replay, sandbox, live=live, caught_up=caught_up, updates=updates)
    differing = differences(live, caught_up) if change is None else change.different
    return OutsideChange(
        ordinal=replay.differs_at,
        step=step_of(scene, replay.differs_at),
        kind=None if change is None else change.kind,
        writes=tuple(_writes(scene, replay)),
        different=tuple(differing[:MAX_TENSORS]),
        loss_with_change=None if change is None else change.loss,
        repaired=repaired_share(scene, replay),
    )


def _writes(scene: Scene, replay: Reproduction) -> list[OutsideWrite]:
    """Recorded writes just before the first different loss: to the weights, or to the optimizer's state before."""
    first = replay.differs_at
    return [w for w in scene.writes if first is not None and first - 2 <= w.ordinal < first]


def repaired_share(scene: Scene, replay: Reproduction) -> float | None:
    """Share of the jump that the replay lacks; `None` if the replay did not reach the target batch."""
    usual = _usual(scene, replay)
    if replay.reached != scene.target_ordinal or usual is None:
        return None
    before, replayed, recorded = usual
    return min(max((recorded - replayed) / (recorded - before), 0.0), 1.0) if recorded > before else None


def _caught_up(scene: Scene, replay: Reproduction, sandbox: Sandbox, updates: Sequence[Update]) -> TrainState:
    """The replay continued to the current batch."""
    sandbox.rewind()
    replay.end.load(sandbox)
    for update in updates:
        if make_update(sandbox, update).spoilt_at is not None:
            break
    return TrainState.take(sandbox, scene.entries[-1].at)


def step_of(scene: Scene, ordinal: int | None) -> int | None:
    """The optimizer step of a recorded batch; `None` for an unknown one."""
    return next((e.at.step for e in scene.entries if e.at.ordinal == ordinal), None)


def _comes_out_healthy(scene: Scene, replay: Reproduction) -> bool:
    """Whether the replay first agreed, then differed, and at the onset is nearer to the normal loss than the spike."""
    if replay.reached != scene.target_ordinal or replay.differs_at is None or not math.isfinite(replay.replayed):
        return False
    usual = _usual(scene, replay)
    if usual is None:
        return False
    before, replayed, recorded = usual
    agreed = replay.differs_at - scene.snapshot.at.ordinal
    return agreed >= MIN_EQUAL_BATCHES and replayed - before < recorded - replayed


def _usual(scene: Scene, replay: Reproduction) -> tuple[float, float, float] | None:
    """Normal, replayed and recorded loss on the scale of `log_scale`; `None` without earlier losses."""
    before = scene.losses_before()
    before = before[np.isfinite(before)][-RECENT_LOSSES:]
    if not before.size:
        return None
    scale = log_scale(before, np.array([replay.replayed, scene.recorded]))
    replayed, recorded = scale(np.array([replay.replayed, scene.recorded]))
    return float(np.median(scale(before))), float(replayed), float(recorded)


def mode_change(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> OutsideChange | None:
    """The change of train/eval modes that caused the jump, else `None`.

    The replay is repeated with the recorded modes. They are the cause if it then gives the recorded losses and most of
    the jump is missing with the earlier modes. Without a change of modes, or on several ranks, nothing is run.

    Args:
        scene: The episode.
        replay: Its replay, which differs and has the modes of the snapshot.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
    """
    changed = [k for k in scene.modes if scene.snapshot.at.ordinal < k <= scene.target_ordinal]
    repaired = repaired_share(scene, replay)
    if not changed or repaired is None or repaired < CONFIRMING_SHARE or sandbox.trainer.world_size > 1:
        return None
    actual = _loss_with_recorded_modes(scene, sandbox)
    if actual is None or not is_same(actual, scene.recorded):
        return None
    return OutsideChange(
        ordinal=replay.differs_at,
        step=step_of(scene, changed[-1]),
        kind="modes",
        eval_modules=tuple(scene.modes[changed[-1]]),
        loss_with_change=actual,
        repaired=repaired,
    )


def _loss_with_recorded_modes(scene: Scene, sandbox: Sandbox) -> float | None:
    """The target batch's loss with the recorded modes."""
    sandbox.rewind()
    sandbox.modes = scene.modes
    try:
        found = reproduce(sandbox, TrainState.of(scene.snapshot), scene.stretch, scene.settings, scene.losses)
    except CannotReplay:
        return None
    finally:
        sandbox.modes = {}
    return found.replayed if found.reached == scene.target_ordinal else None
