"""Whether modules that were put into another mode during the run made the jump.

The replay is repeated with the recorded train/eval modes.
"""

from lightning_spike.diagnosis.judgement import MODES_REPAIRED
from lightning_spike.errors import CannotReplay
from lightning_spike.experiments import OutsideChange
from lightning_spike.lab.experiments.outside import repaired_share, step_of
from lightning_spike.lab.replay.reproduce import Reproduction, is_same, reproduce
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState


def mode_change(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> OutsideChange | None:
    """The change of modes that made the jump; `None` where modes did not.

    The replay is repeated with the recorded modes: only where the recorded losses come out then, and most of the jump
    is gone with the modes of before, are they the cause. Where modes have not changed since the snapshot, or on several
    ranks, it costs nothing.

    Args:
        scene: The episode.
        replay: Its replay, which differs and has the modes of the snapshot.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
    """
    changed = [k for k in scene.modes if scene.snapshot.at.ordinal < k <= scene.target_ordinal]
    repaired = repaired_share(scene, replay)
    if not changed or repaired is None or repaired < MODES_REPAIRED or sandbox.trainer.world_size > 1:
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
    """The loss of the batch in question with the recorded modes."""
    sandbox.rewind()
    sandbox.modes = scene.modes
    try:
        found = reproduce(sandbox, TrainState.of(scene.snapshot), scene.stretch, scene.settings, scene.losses)
    except CannotReplay:
        return None
    finally:
        sandbox.modes = {}
    return found.replayed if found.reached == scene.target_ordinal else None
