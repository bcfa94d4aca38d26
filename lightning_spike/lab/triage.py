"""The first examination of an episode: is it the batch or the weights, and where was the first NaN born."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_spike.actions.batch_ring import BatchRing, RingEntry
from lightning_spike.actions.snapshot import Snapshot, Snapshots
from lightning_spike.actions.state_copy import load_module
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import Bench, isolated
from lightning_spike.lab.nonfinite import Origin, nonfinite_origin
from lightning_spike.lab.reproduce import Reproduction, Settings, reproduce
from lightning_spike.lab.split import Split, batch_noise, split
from lightning_spike.records import Episode, EpisodeKind, Finding
from lightning_spike.store import TrainerStateStore

__all__ = ["Scene", "not_run", "triage"]

WINDOW: Final = 64
"""Losses before the onset that the scatter of ordinary batches is taken from."""
NEAR: Final = 2
"""Batches before the onset from which a re-run that begins to differ is a spike that does not come back."""
PROOF: Final = 3
"""Batches that must have come out the same before that is believed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that an examination works with."""

    trainer: Trainer
    module: LightningModule
    store: TrainerStateStore
    ring: BatchRing
    snapshots: Snapshots
    settings: Mapping[int, Settings]
    """Of the updates, by ordinal; see `reproduce.settings_of`."""
    controls: int
    """Batches to compare with, at most."""

    def recorded(self, first: int, last: int) -> dict[int, float]:
        """Training losses by ordinal, as far as they are known."""
        losses = {ordinal: self.store.history.at("loss", ordinal) for ordinal in range(first, last + 1)}
        return {ordinal: loss for ordinal, loss in losses.items() if loss is not None}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """The episode, with what is needed to run it again."""

    scene: Scene
    episode: Episode
    spike: RingEntry
    snapshot: Snapshot
    recorded: float


def triage(scene: Scene, episode: Episode) -> list[Finding]:
    """Examine one episode; leaves no trace in the training. Blocks.

    Returns:
        Findings of the detector "lab": `nonfinite_origin` where a NaN or Inf could be traced, and `split`.

    Raises:
        CannotReplay: It cannot be examined; the message says why.
        Exception: Whatever the module's own code raises when it is run again. The training is untouched all the same.
    """
    case = _open(scene, episode)
    with isolated(scene.trainer, scene.module, with_optimizers=True) as bench:
        again, why = _reproduced(case, bench)
        if again is not None and again.differs_at is not None:
            if _comes_out_healthy(case, again):
                return [_finding(case, "split", _outside(case, again))]
            why = f"the re-run differs from the training from ordinal {again.differs_at} on"
            again = None
        findings = _origins(case, bench, again)
        parts = _split(case, bench, again)
    return [*findings, _finding(case, "split", parts.detail() | {"exact": again is not None, "why_not_exact": why})]


def not_run(episode: Episode, why: str) -> Finding:
    """That an episode was not examined, and why."""
    return Finding(detector="lab", kind="not_run", at=episode.onset, detail={"episode": episode.id, "why": why})


def _open(scene: Scene, episode: Episode) -> _Case:
    onset = episode.onset.ordinal
    spike, snapshot = scene.ring.entry(onset), scene.snapshots.latest_healthy(before=onset)
    recorded = scene.store.history.at("loss", onset)
    if spike is None:
        msg = f"the batch of the onset (step {episode.onset.step}) is not held any more"
        raise CannotReplay(msg)
    if snapshot is None:
        msg = scene.snapshots.unavailable or "there is no snapshot from before the onset that has proven healthy"
        raise CannotReplay(msg)
    if recorded is None:
        msg = "the training loss at the onset was not recorded"
        raise CannotReplay(msg)
    return _Case(scene=scene, episode=episode, spike=spike, snapshot=snapshot, recorded=recorded)


def _reproduced(case: _Case, bench: Bench) -> tuple[Reproduction | None, str | None]:
    """The run from the snapshot to the onset; `None` and the reason where that cannot be had."""
    first, last = case.snapshot.at.ordinal, case.spike.at.ordinal
    entries = [entry for entry in case.scene.ring.entries() if first <= entry.at.ordinal <= last]
    try:
        again = reproduce(bench, case.snapshot, entries, case.scene.settings, case.scene.recorded(first, last))
    except CannotReplay as reason:
        return None, str(reason)
    return again, None


def _comes_out_healthy(case: _Case, again: Reproduction) -> bool:
    """All went alike up to the onset, and there the spike is not."""
    onset, start = case.spike.at.ordinal, case.snapshot.at.ordinal
    at = again.differs_at if again.differs_at is not None else onset
    lower = math.isfinite(again.replayed) and not again.replayed >= case.recorded
    return again.reached == onset and at >= max(onset - NEAR, start + PROOF) and lower


def _outside(case: _Case, again: Reproduction) -> dict[str, Any]:
    jump = math.log(case.recorded / again.replayed) if again.replayed > 0 and 0 < case.recorded < math.inf else math.nan
    text = (
        f"Run again from {again.steps} batches before, with the same batches, learning rates and random states, the loss is {again.replayed:.3g} where it was "
        f"{case.recorded:.3g}: something that the re-run does not carry did it (state changed from outside, or a fault of the machine)."
    )
    shares = {"data": 0.0, "weights": 0.0, "interaction": 0.0, "noise": 0.0, "exact": True, "why_not_exact": None}
    return {"jump": jump if math.isfinite(jump) else None, **shares, "verdict": "not_reproduced", "text": text}


# -- where NaN is born ---------------------------------------------------------------------------------------------------


def _origins(case: _Case, bench: Bench, again: Reproduction | None) -> list[Finding]:
    if case.episode.kind is not EpisodeKind.NONFINITE and math.isfinite(case.recorded):
        return []
    entry = case.spike if again is None else (case.scene.ring.entry(again.reached) or case.spike)
    old = _origin(bench, case.snapshot.model, entry)
    new = old if again is None else _origin(bench, again.weights, entry)
    origin = new or old
    if origin is None:
        return []
    healthy = old is not None
    text = origin.text if healthy else f"{origin.text} With weights from before, the same batch passes."
    detail = {"phase": origin.phase, "module": origin.module, "operation": origin.operation, "text": text}
    return [_finding(case, "nonfinite_origin", detail | {"with_healthy_weights": healthy})]


def _origin(bench: Bench, weights: Mapping[str, Tensor], entry: RingEntry) -> Origin | None:
    bench.rewind()
    load_module(bench.module, weights)
    return nonfinite_origin(bench, entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at)


# -- batch or weights ----------------------------------------------------------------------------------------------------


def _split(case: _Case, bench: Bench, again: Reproduction | None) -> Split:
    before = case.scene.store.history.before("loss", case.episode.onset.ordinal, WINDOW)
    return split(
        bench,
        case.spike,
        _controls(case),
        old=case.snapshot.model,
        new=again.weights if again is not None and again.reached == case.spike.at.ordinal else None,
        recorded=case.recorded,
        scatter=batch_noise(before),
    )


def _controls(case: _Case) -> Sequence[RingEntry]:
    """The newest batches trained on before the snapshot (both weights have seen them), made up with later ones from before the onset."""
    onset, start = case.episode.onset.ordinal, case.snapshot.at.ordinal
    losses = case.scene.recorded(0, onset) if onset < WINDOW else case.scene.recorded(onset - 2 * WINDOW, onset)
    usable: Callable[[RingEntry], bool] = lambda e: not e.mutated and math.isfinite(losses.get(e.at.ordinal, math.nan))  # noqa: E731
    held = [entry for entry in case.scene.ring.entries() if entry.at.ordinal < onset and usable(entry)]
    seen = [entry for entry in held if entry.at.ordinal < start][::-1]
    later = [entry for entry in held if entry.at.ordinal >= start]
    chosen = [*seen, *later][: case.scene.controls]
    if not chosen:
        msg = "no ordinary batch from before the onset is held, to compare with"
        raise CannotReplay(msg)
    return chosen


def _finding(case: _Case, kind: str, detail: Mapping[str, Any]) -> Finding:
    return Finding(detector="lab", kind=kind, at=case.episode.onset, detail={"episode": case.episode.id, **detail})
