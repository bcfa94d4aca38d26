"""The examination of one episode: run it again, say where a NaN was born, and whether it was the batch or the weights."""

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.state_copy import load_module
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import Bench, isolated
from lightning_spike.lab.nonfinite import Origin, nonfinite_origin
from lightning_spike.lab.reproduce import Reproduction, reproduce
from lightning_spike.lab.scene import Scene
from lightning_spike.lab.split import Split, batch_noise, split
from lightning_spike.lab.state import TrainState
from lightning_spike.records import Episode, EpisodeKind, Finding

__all__ = ["examine", "not_run"]

NEAR: Final = 2
"""Batches before the onset from which a re-run that begins to differ is a spike that does not come back."""
PROOF: Final = 3
"""Batches that must have come out the same before that is believed."""


def examine(scene: Scene) -> list[Finding]:
    """Examine one episode; leaves no trace in the training. Blocks.

    Returns:
        Findings of the detector "lab": `nonfinite_origin` where a NaN or Inf could be traced, and `split`.

    Raises:
        CannotReplay: It cannot be examined; the message says why.
        Exception: Whatever the module's own code raises when it is run again. The training is untouched all the same.
    """
    with isolated(scene.trainer, scene.module, with_optimizers=True) as bench:
        again, why = _reproduced(scene, bench)
        if again is not None and again.differs_at is not None:
            if _comes_out_healthy(scene, again):
                return [_finding(scene, "split", _outside(scene, again))]
            why = f"the re-run differs from the training from ordinal {again.differs_at} on"
            again = None
        findings = _origins(scene, bench, again)
        parts = _split(scene, bench, again)
    return [*findings, _finding(scene, "split", parts.detail() | {"exact": again is not None, "why_not_exact": why})]


def not_run(episode: Episode, why: str) -> Finding:
    """That an episode was not examined, and why."""
    return Finding(detector="lab", kind="not_run", at=episode.onset, detail={"episode": episode.id, "why": why})


def _reproduced(scene: Scene, bench: Bench) -> tuple[Reproduction | None, str | None]:
    """The run from the snapshot to the onset; `None` and the reason where that cannot be had."""
    try:
        return reproduce(bench, TrainState.of(scene.snapshot), scene.stretch, scene.settings, scene.losses), None
    except CannotReplay as reason:
        return None, str(reason)


def _comes_out_healthy(scene: Scene, again: Reproduction) -> bool:
    """All went alike up to the onset, and there the spike is not."""
    at = again.differs_at if again.differs_at is not None else scene.onset
    lower = math.isfinite(again.replayed) and not again.replayed >= scene.recorded
    return again.reached == scene.onset and at >= max(scene.onset - NEAR, scene.snapshot.at.ordinal + PROOF) and lower


def _outside(scene: Scene, again: Reproduction) -> dict[str, Any]:
    recorded = scene.recorded
    jump = math.log(recorded / again.replayed) if again.replayed > 0 and 0 < recorded < math.inf else math.nan
    text = (
        f"Run again from {again.steps} batches before, with the same batches, learning rates and random states, the loss is {again.replayed:.3g} where it was "
        f"{recorded:.3g}: something that the re-run does not carry did it (state changed from outside, or a fault of the machine)."
    )
    shares = {"data": 0.0, "weights": 0.0, "interaction": 0.0, "noise": 0.0, "exact": True, "why_not_exact": None}
    return {"jump": jump if math.isfinite(jump) else None, **shares, "verdict": "not_reproduced", "text": text}


# -- where NaN is born ---------------------------------------------------------------------------------------------------


def _origins(scene: Scene, bench: Bench, again: Reproduction | None) -> list[Finding]:
    if scene.episode.kind is not EpisodeKind.NONFINITE and math.isfinite(scene.recorded):
        return []
    reached = scene.onset if again is None else again.reached
    entry = next((e for e in scene.entries if e.at.ordinal == reached), scene.spike)
    old = _origin(bench, scene.snapshot.model, entry)
    new = old if again is None else _origin(bench, again.weights, entry)
    origin = new or old
    if origin is None:
        return []
    healthy = old is not None
    text = origin.text if healthy else f"{origin.text} With weights from before, the same batch passes."
    detail = {"phase": origin.phase, "module": origin.module, "operation": origin.operation, "text": text}
    return [_finding(scene, "nonfinite_origin", detail | {"with_healthy_weights": healthy})]


def _origin(bench: Bench, weights: Mapping[str, Tensor], entry: RingEntry) -> Origin | None:
    bench.rewind()
    load_module(bench.module, weights)
    return nonfinite_origin(bench, entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at)


# -- batch or weights ----------------------------------------------------------------------------------------------------


def _split(scene: Scene, bench: Bench, again: Reproduction | None) -> Split:
    return split(
        bench,
        scene.spike,
        scene.ordinary(),
        old=scene.snapshot.model,
        new=again.weights if again is not None and again.reached == scene.onset else None,
        recorded=scene.recorded,
        scatter=batch_noise(scene.losses_before()),
    )


def _finding(scene: Scene, kind: str, detail: Mapping[str, Any]) -> Finding:
    return Finding(detector="lab", kind=kind, at=scene.episode.onset, detail={"episode": scene.episode.id, **detail})
