"""Measures a change that the replay does not carry and that made the loss jump.

What was changed, when, and by how much.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.experiments import OutsideChange, OutsideWrite
from lightning_spike.lab.experiments.outside_change import change_from_outside
from lightning_spike.lab.replay.compare import differences
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MIN_SAME_BATCHES: Final = 3
"""Batches that must have come out the same before a difference is taken for a change from outside: what is not
reproducible at all differs from the start."""
MAX_TENSORS: Final = 8
"""Tensors listed at most."""
RECENT_LOSSES: Final = 16
"""Losses before the onset whose median is where the loss was."""


def came_from_outside(scene: Scene, replay: Reproduction) -> bool:
    """Whether a re-run that differs from the training shows a change from outside.

    Without it the loss is healthy, or somebody was seen writing just before.
    """
    return _comes_out_healthy(scene, replay) or bool(_writes(scene, replay))


def outside_change(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> OutsideChange:
    """What was changed: the loss in the replay, which writes were seen, and which tensors differ now.

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
    """Those just before the first loss that is another.

    Into the weights before its batch, or into the optimizer's state before the update before that.
    """
    first = replay.differs_at
    return [w for w in scene.writes if first is not None and first - 2 <= w.ordinal < first]


def repaired_share(scene: Scene, replay: Reproduction) -> float | None:
    """Share of the jump that is gone in the re-run, which has everything but the change; `None` where it did not come to the struck batch."""
    usual = _usual(scene, replay)
    if replay.reached != scene.target_ordinal or usual is None:
        return None
    before, replayed, recorded = usual
    return min(max((recorded - replayed) / (recorded - before), 0.0), 1.0) if recorded > before else None


def _caught_up(scene: Scene, replay: Reproduction, sandbox: Sandbox, updates: Sequence[Update]) -> TrainState:
    """The re-run taken on to the present."""
    sandbox.rewind()
    replay.end.load(sandbox)
    for update in updates:
        if make_update(sandbox, update).spoilt_at is not None:
            break
    return TrainState.take(sandbox, scene.entries[-1].at)


def step_of(scene: Scene, ordinal: int | None) -> int | None:
    return next((e.at.step for e in scene.entries if e.at.ordinal == ordinal), None)


def _comes_out_healthy(scene: Scene, replay: Reproduction) -> bool:
    """Some batches went alike, then they did not, and at the onset the re-run is nearer to where the loss was than to the spike."""
    if replay.reached != scene.target_ordinal or replay.differs_at is None or not math.isfinite(replay.replayed):
        return False
    usual = _usual(scene, replay)
    if usual is None:
        return False
    before, replayed, recorded = usual
    return replay.differs_at >= scene.snapshot.at.ordinal + MIN_SAME_BATCHES and replayed - before < recorded - replayed


def _usual(scene: Scene, replay: Reproduction) -> tuple[float, float, float] | None:
    """The loss as it was, as it came out again, and as it was recorded, on the scale of `log_scale`; `None` where nothing is known from before."""
    before = scene.losses_before()
    before = before[np.isfinite(before)][-RECENT_LOSSES:]
    if not before.size:
        return None
    scale = log_scale(before, np.array([replay.replayed, scene.recorded]))
    replayed, recorded = scale(np.array([replay.replayed, scene.recorded]))
    return float(np.median(scale(before))), float(replayed), float(recorded)
