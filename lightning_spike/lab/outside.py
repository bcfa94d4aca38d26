"""Something that the re-run does not carry made the loss jump: what was changed, when, and by how much."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.lab.blame import blame_outside
from lightning_spike.lab.compare import differences
from lightning_spike.lab.evaluate import log_scale
from lightning_spike.lab.findings import blame_finding, finding
from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.outside_writes import OutsideWrite
from lightning_spike.lab.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.lab.state import TrainState
from lightning_spike.lab.update import make_update, updates_of
from lightning_spike.lab.wording import differences_text
from lightning_spike.records import Finding

__all__ = ["came_from_outside", "outside_findings"]

PROOF: Final = 3
"""Batches that must have come out the same before a difference is taken for a change from outside: what is not reproducible at all differs from the start."""
TOLD: Final = 8
"""Tensors listed at most."""
RECENT: Final = 16
"""Losses before the onset whose median is where the loss was."""


def came_from_outside(scene: Scene, again: Reproduction) -> bool:
    """Whether a re-run that differs from the training shows a change from outside: without it the loss is healthy, or somebody was seen writing just before."""
    return _comes_out_healthy(scene, again) or bool(_writes(scene, again))


def outside_findings(scene: Scene, again: Reproduction, bench: Bench) -> list[Finding]:
    """What can be said of it: the loss as it comes out again, who wrote into what, and which tensors differ now.

    The re-run is taken on to the present for that, with all updates that the training has made since.

    Args:
        scene: The episode.
        again: Its re-run.
        bench: Inside `isolated(..., with_optimizers=True)`.
    """
    recorded = scene.recorded
    jump = math.log(recorded / again.replayed) if again.replayed > 0 and 0 < recorded < math.inf else math.nan
    text = (
        f"Run again from {again.steps} batches before, with the same batches, learning rates and random states, the loss is {again.replayed:.3g} where it was "
        f"{recorded:.3g}: something that the re-run does not carry did it (state changed from outside, or a fault of the machine)."
    )
    shares = {"data": 0.0, "weights": 0.0, "interaction": 0.0, "excess": 0.0, "noise": 0.0}
    split = {"jump": jump if math.isfinite(jump) else None, **shares, "exact": True, "why_not_exact": None}
    writes = _writes(scene, again)
    bench.rewind()
    live = TrainState.take(bench, scene.entries[-1].at)
    differing = differences(live, _caught_up(scene, again, bench))
    outside = {
        "ordinal": again.differs_at,
        "step": _step_of(scene, again.differs_at),
        "writes": [dataclasses.asdict(write) for write in writes],
        "different": [dataclasses.asdict(difference) for difference in differing[:TOLD]],
        "text": differences_text(differing, writes),
    }
    return [
        finding(scene, "split", split | {"verdict": "not_reproduced", "text": text}),
        finding(scene, "outside", outside),
        blame_finding(scene, blame_outside(_kind(writes))),
    ]


def _writes(scene: Scene, again: Reproduction) -> list[OutsideWrite]:
    """Those just before the first loss that is another: into the weights before its batch, or into the optimizer's state before the update before that."""
    first = again.differs_at
    return [w for w in scene.writes if first is not None and first - 2 <= w.ordinal < first]


def _kind(writes: Sequence[OutsideWrite]) -> str:
    return "optimizer" if any(w.kind == "optimizer" for w in writes) else "weights"


def _caught_up(scene: Scene, again: Reproduction, bench: Bench) -> TrainState:
    """The re-run taken on to the present, with all updates that the training has made since."""
    bench.rewind()
    again.end.load(bench)
    for update in updates_of(
        [*scene.after, _beyond(scene)], scene.settings, by_hand=not bench.module.automatic_optimization
    ):
        if make_update(bench, update).spoilt_at is not None:
            break
    return TrainState.take(bench, scene.entries[-1].at)


def _beyond(scene: Scene) -> RingEntry:
    """A batch that is not there yet: where the last update ends, if there was one."""
    last = scene.entries[-1]
    stepped = last.at.ordinal in scene.settings
    at = dataclasses.replace(last.at, ordinal=last.at.ordinal + 1, step=last.at.step + stepped)
    return dataclasses.replace(last, at=at)


def _step_of(scene: Scene, ordinal: int | None) -> int | None:
    return next((e.at.step for e in scene.entries if e.at.ordinal == ordinal), None)


def _comes_out_healthy(scene: Scene, again: Reproduction) -> bool:
    """Some batches went alike, then they did not, and at the onset the re-run is nearer to where the loss was than to the spike."""
    if again.reached != scene.struck or again.differs_at is None or not math.isfinite(again.replayed):
        return False
    before = scene.losses_before()
    before = before[np.isfinite(before)][-RECENT:]
    scale = log_scale(before, np.array([again.replayed, scene.recorded]))
    usual = float(np.median(scale(before))) if before.size else math.nan
    replayed, recorded = scale(np.array([again.replayed, scene.recorded]))
    return again.differs_at >= scene.snapshot.at.ordinal + PROOF and bool(replayed - usual < recorded - replayed)
