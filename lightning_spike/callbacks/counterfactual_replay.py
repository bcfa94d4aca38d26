"""`CounterfactualReplay`: after an episode, run the moment again and see whether the batch or the weights made the loss jump."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import number, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.flight.participant import TrainingBatch
from lightning_spike.lab.budget import FULL_STEPS, TRIAGE_STEPS, Budget, Extent
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.examine import examine, triage
from lightning_spike.lab.findings import not_run
from lightning_spike.lab.live_scene import EXAMINED, Witnesses, live_scene
from lightning_spike.records import Action, Episode, EpisodeKind, Finding, RunStatus

__all__ = ["CounterfactualReplay"]

OUTGROWN: Final = 2.0
"""How many times as severe an episode must have become since its examination for it to be examined again, at its peak."""
FREE_SECONDS: Final = 5.0
"""Seconds in all that re-runs may take whatever the budget: nobody minds a few, and a short run has no 2 % to spend."""


class CounterfactualReplay(SpikeCallback):
    """Confirms causes by experiment: after an episode, the moment is run again with the weights and the batches exchanged.

    From the last snapshot that has proven healthy the run is trained again up to the onset, with the recorded batches, random states and learning rates; then old and
    new weights are evaluated on the batch of the onset and on ordinary ones. That splits the jump into what the batch does and what the weights do; a spike that does not
    come back was made from outside. Where the loss is not finite, the module and operation that made the first such value are named.

    Afterwards everything is as before, to the bit, and so is the rest of the training; where a moment cannot be run again, the report says why.
    What leaks all the same is what `training_step` itself writes to files, globals or writers of its own (`lab.isolation`). Not run: with more than one rank.

    Args:
        budget: Share of the run's time so far that re-runs may take, above 0 and at most 1; 5 seconds in all are free on top of it, so that short
            runs get their answers too, and the first episode is always examined. Episodes are examined as they come; one that is worse than all before it may
            overdraw the budget, others that no longer fit get a triage (some three steps' worth), or are named in the report.
        max_episodes: Episodes examined at most in one fit.
        controls: Ordinary batches that the batch of the onset is compared with; more make small effects of the weights visible.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(self, budget: float = 0.02, max_episodes: int = 20, controls: int = 8) -> None:
        self.budget = number(
            "CounterfactualReplay(budget)", budget, above=0.0, at_most=1.0, do="Use 0.02 for 2 % of the run's time."
        )
        self.max_episodes = whole_number(
            "CounterfactualReplay(max_episodes)",
            max_episodes,
            at_least=1,
            do="Leave the callback out for no re-runs at all.",
        )
        self.controls = whole_number(
            "CounterfactualReplay(controls)", controls, at_least=1, do="Use 8, or 2 for speed."
        )
        self._forget()

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._forget()
        self._witnesses = Witnesses.of(self.flight, trainer, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first = self.flight.last_moment(trainer).ordinal

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        self._waiting |= {e.id: e for e in changed if e.kind in EXAMINED and e.id not in self._seen}
        due = [e for e in self._waiting.values() if not _may_wait(e, batch)]
        due += [e for e in changed if self._has_outgrown(e)]
        for episode in sorted(due, key=lambda e: -e.severity):
            self._waiting.pop(episode.id, None)
            self._examine(batch, episode, again=episode.id in self._seen)
            self._seen.setdefault(episode.id, []).append(episode.severity)

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        for episode in self._waiting.values():
            self.flight.store.note(not_run(episode, "the run ended with it"))

    def _forget(self) -> None:
        self._seen: dict[int, list[float]] = {}
        """By the id of an examined episode, its severity at each examination."""
        self._waiting: dict[int, Episode] = {}
        self._budget = Budget(share=self.budget, free=FREE_SECONDS)
        self._began = time.monotonic()
        self._first = 0

    def _has_outgrown(self, episode: Episode) -> bool:
        """What was examined was only the beginning: the peak has become another matter. Looked into once; if the weights were at fault already, it is their doing."""
        severities = self._seen.get(episode.id, [])
        return (
            len(severities) == 1
            and episode.severity > OUTGROWN * severities[0]
            and not self._weights_are_to_blame(episode)
        )

    def _weights_are_to_blame(self, episode: Episode) -> bool:
        told = (f.detail for f in self.flight.store.findings if f.detector == "lab" and f.kind == "blame")
        return any(d["first"] != "data" for d in told if d["episode"] == episode.id)

    def _examine(self, batch: TrainingBatch, episode: Episode, *, again: bool) -> None:
        extent, why = self._extent(batch, episode)
        if extent is None:
            self.flight.store.note(*([] if again else [not_run(episode, why)]))
            return
        started = time.monotonic()
        findings = self._findings(batch, episode, extent, again=again)
        seconds = time.monotonic() - started
        done = any(finding.kind != "not_run" for finding in findings)
        self._budget.took(seconds, extent=extent if done else "triage", severity=episode.severity)
        self.flight.store.note(*(findings if done or not again else []))
        if done:
            detail = {
                "episode": episode.id,
                "extent": extent,
                "seconds": round(seconds, 3),
                "findings": [f.kind for f in findings],
            }
            self.flight.store.note(Action(action="replay", at=batch.at, detail=detail))

    def _findings(self, batch: TrainingBatch, episode: Episode, extent: Extent, *, again: bool) -> list[Finding]:
        examination = examine if extent == "full" else triage
        try:
            scene = live_scene(batch, episode, self._witnesses, controls=self.controls)
            at_peak = again and any(entry.at.ordinal == episode.peak.ordinal for entry in scene.entries)
            return examination(dataclasses.replace(scene, looks_at=episode.peak.ordinal) if at_peak else scene)
        except CannotReplay as reason:
            return [not_run(episode, str(reason))]
        except Exception as error:  # noqa: BLE001 - the user's code, run once more; the training is untouched and goes on
            return [not_run(episode, f"the re-run failed: {type(error).__name__}: {error}")]

    def _extent(self, batch: TrainingBatch, episode: Episode) -> tuple[Extent | None, str]:
        """How far to examine, and if not at all, why."""
        if batch.trainer.world_size > 1:
            return (
                None,
                "with several ranks a forward pass may wait for the others; the moment is run again on single processes only",
            )
        if self._budget.examined >= self.max_episodes:
            return None, f"max_episodes={self.max_episodes} were examined already"
        elapsed = time.monotonic() - self._began - self._budget.spent
        pace = elapsed / max(batch.at.ordinal - self._first, 1)
        snapshot = self._witnesses.snapshots.latest_healthy(before=episode.onset.ordinal)
        way = 0 if snapshot is None else episode.onset.ordinal - snapshot.at.ordinal
        full, triage_only = pace * (way + FULL_STEPS), pace * TRIAGE_STEPS
        extent = self._budget.extent(severity=episode.severity, elapsed=elapsed, full=full, triage=triage_only)
        spent = f"re-runs took {self._budget.spent:.2g} s already"
        return extent, f"{spent}, and another would not fit into budget={self.budget:.3g} of the run's time"


def _may_wait(episode: Episode, batch: TrainingBatch) -> bool:
    """Whether to look at the next loss first: where the batch of the onset has only just been trained on, the jump itself may be still to come."""
    if episode.kind is EpisodeKind.NONFINITE or batch.at.ordinal > episode.onset.ordinal:
        return False
    trainer = batch.trainer
    in_last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    is_last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    return not (is_last or (in_last_epoch and trainer.is_last_batch))
