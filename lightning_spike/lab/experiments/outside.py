"""Something that the re-run does not carry made the loss jump: what was changed, when, and by how much."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.lab.experiments.blame import blame_outside
from lightning_spike.lab.experiments.findings import blame_finding, finding
from lightning_spike.lab.experiments.outside_change import ChangeKind, OutsideChange, change_from_outside
from lightning_spike.lab.experiments.split import not_reproduced
from lightning_spike.lab.experiments.wording import outside_text, repaired_text
from lightning_spike.lab.replay.compare import differences
from lightning_spike.lab.replay.evaluate import log_scale
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.lab.replay.updates_since import updates_since
from lightning_spike.lab.scene import Scene
from lightning_spike.record.outside_writes import OutsideWrite
from lightning_spike.records import Finding
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

PROOF: Final = 3
"""Batches that must have come out the same before a difference is taken for a change from outside: what is not reproducible at all differs from the start."""
TOLD: Final = 8
"""Tensors listed at most."""
RECENT: Final = 16
"""Losses before the onset whose median is where the loss was."""


def came_from_outside(scene: Scene, replay: Reproduction) -> bool:
    """Whether a re-run that differs from the training shows a change from outside: without it the loss is healthy, or somebody was seen writing just before."""
    return _comes_out_healthy(scene, replay) or bool(_writes(scene, replay))


def outside_findings(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> list[Finding]:
    """What can be said of it: the loss as it comes out again, who wrote into what, and which tensors differ now.

    The re-run is taken on to the present for that, with all updates that the training has made since; and the training is wound back to where it left the re-run, where that can be
    done (`outside_change`). The re-run is the run with the change undone: what of the jump it does not have is the change's (`repaired`).

    Args:
        scene: The episode.
        replay: Its re-run.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
    """
    recorded = scene.recorded
    jump = math.log(recorded / replay.replayed) if replay.replayed > 0 and 0 < recorded < math.inf else math.nan
    text = (
        f"Run again from {replay.steps} batches before, with the same batches, learning rates and random states, the loss is {replay.replayed:.3g} where it was "
        f"{recorded:.3g}: something that the re-run does not carry did it (state changed from outside, or a fault of the machine)."
    )
    writes = _writes(scene, replay)
    sandbox.rewind()
    live = TrainState.take(sandbox, scene.entries[-1].at)
    updates = updates_since(scene, sandbox)
    caught_up = _caught_up(scene, replay, sandbox, updates)
    change = change_from_outside(scene, replay, sandbox, live=live, caught_up=caught_up, updates=updates)
    differing = change.different if change is not None else differences(live, caught_up)
    repaired = repaired_share(scene, replay)
    outside = {
        "ordinal": replay.differs_at,
        "step": _step_of(scene, replay.differs_at),
        "writes": [dataclasses.asdict(write) for write in writes],
        "different": [dataclasses.asdict(difference) for difference in differing[:TOLD]],
        "changed": None if change is None else change.kind,
        "with_change": None if change is None else change.loss,
        "repaired": repaired,
        "text": f"{outside_text(change, writes, differing)} {repaired_text(repaired)}".strip(),
    }
    return [
        finding(scene, "split", not_reproduced(text, jump=jump)),
        finding(scene, "outside", outside),
        blame_finding(scene, blame_outside(_kind(writes, change))),
    ]


def _writes(scene: Scene, replay: Reproduction) -> list[OutsideWrite]:
    """Those just before the first loss that is another: into the weights before its batch, or into the optimizer's state before the update before that."""
    first = replay.differs_at
    return [w for w in scene.writes if first is not None and first - 2 <= w.ordinal < first]


def _kind(writes: Sequence[OutsideWrite], change: OutsideChange | None) -> ChangeKind:
    """What the experiment says; where it says nothing, or cannot tell momentum and gradient apart, what was seen to be written into."""
    seen: ChangeKind = "optimizer" if any(w.kind == "optimizer" for w in writes) else "weights"
    if change is None or (change.kind == "momentum_or_gradient" and seen == "optimizer"):
        return seen
    return change.kind


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


def _step_of(scene: Scene, ordinal: int | None) -> int | None:
    return next((e.at.step for e in scene.entries if e.at.ordinal == ordinal), None)


def _comes_out_healthy(scene: Scene, replay: Reproduction) -> bool:
    """Some batches went alike, then they did not, and at the onset the re-run is nearer to where the loss was than to the spike."""
    if replay.reached != scene.target_ordinal or replay.differs_at is None or not math.isfinite(replay.replayed):
        return False
    usual = _usual(scene, replay)
    if usual is None:
        return False
    before, replayed, recorded = usual
    return replay.differs_at >= scene.snapshot.at.ordinal + PROOF and replayed - before < recorded - replayed


def _usual(scene: Scene, replay: Reproduction) -> tuple[float, float, float] | None:
    """The loss as it was, as it came out again, and as it was recorded, on the scale of `log_scale`; `None` where nothing is known from before."""
    before = scene.losses_before()
    before = before[np.isfinite(before)][-RECENT:]
    if not before.size:
        return None
    scale = log_scale(before, np.array([replay.replayed, scene.recorded]))
    replayed, recorded = scale(np.array([replay.replayed, scene.recorded]))
    return float(np.median(scale(before))), float(replayed), float(recorded)
