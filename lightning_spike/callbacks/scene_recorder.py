"""`SceneRecorder`: everything that an episode needs to be run again, written to disk, so that it can be examined when the run is over."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import directory, number, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.errors import CannotReplay
from lightning_spike.lab.encoding import TooLarge
from lightning_spike.lab.live_scene import EXAMINED, Witnesses, live_scene
from lightning_spike.lab.scene_files import write_scene
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.records import Action, Episode, Moment, RunStatus

MB: Final = 1_000_000
CONTROLS: Final = 8
"""Ordinary batches to compare with where no `CounterfactualReplay` says how many; as its default."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    at: Moment
    episode: int
    folder: Path
    size: int


class SceneRecorder(SpikeCallback):
    """Writes the scene of an episode to disk, so that `lightning-spike replay` can examine it in another process, when the run is over.

    For each new spike, divergence or non-finite loss a folder under `<dirpath>/scenes`: the last healthy snapshot, the
    batches from before it up to the present with their random states, the learning rates, the losses, and the present
    weights and optimizer states. It takes as much room as weights and optimizer states twice, and the last 80 or so
    batches; what is the same is written once. All of it is tensors and JSON, and reading it runs no code that it
    brings.

    The training is not changed. Writing blocks for as long as the disk takes, and happens only when there is an
    episode. With more than one rank, and where the batches hold what cannot be written so that it comes back (sparse
    tensors, functions, classes made inside functions), nothing is written, and the report says why.

    Args:
        dirpath: Folder in which `scenes/` is made; by default `<logger.log_dir, else trainer.default_root_dir>/spike`.
            A scene of an earlier run is replaced by one of the same episode number.
        max_scenes: Scenes held at most for one fit; once there are so many, a more severe episode takes the place of
            the least severe.
        max_mb: Megabytes (10^6 bytes) that one scene may take; of larger ones none is written, and the report says so.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(self, dirpath: str | Path | None = None, max_scenes: int = 3, max_mb: float = 512.0) -> None:
        self.dirpath = directory("SceneRecorder(dirpath)", dirpath)
        self.max_scenes = whole_number(
            "SceneRecorder(max_scenes)", max_scenes, at_least=1, do="Leave the callback out for none."
        )
        self.max_mb = number("SceneRecorder(max_mb)", max_mb, above=0, do="Give megabytes: 512.")
        self._forget()

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._forget()
        self._witnesses = Witnesses.of(self.flight, trainer, module)
        self._folder = (self.dirpath or self.flight.default_dirpath) / "scenes"
        if trainer.world_size > 1:
            self._gives_up("with several ranks the moment is run again on single processes only")

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        for episode in changed:
            if self._writes and episode.kind in EXAMINED and episode.id not in self._seen:
                self._seen.add(episode.id)
                self._take_up(batch, episode)

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        for written in self._written:
            place = f"scenes/{written.folder.name}"
            detail = {"episode": written.episode, "path": place, "mb": round(written.size / MB, 3)}
            self.flight.store.note(Action(action="scene", at=written.at, detail=detail))

    def _forget(self) -> None:
        self._seen: set[int] = set()
        self._written: list[_Written] = []
        self._writes = True

    def _take_up(self, batch: TrainingBatch, episode: Episode) -> None:
        least = min(self._written, key=self._severity) if len(self._written) >= self.max_scenes else None
        if least is not None and episode.severity <= self._severity(least):
            return
        try:
            self._write(batch, episode)
        except TooLarge:
            self._gives_up(f"one would take more than {self.max_mb:g} MB (max_mb)")
        except CannotReplay as reason:
            self.flight.store.note(f"The scene of episode {episode.id} was not written: {reason}.")
        except OSError as error:  # the disk is full, or not ours: the training goes on without scenes
            self._gives_up(f"{self._folder} could not be written to: {error}")
        else:
            if least is not None:
                self._written.remove(least)
                shutil.rmtree(least.folder, ignore_errors=True)

    def _write(self, batch: TrainingBatch, episode: Episode) -> None:
        scene = live_scene(batch, episode, self._witnesses, controls=self._controls())
        folder = self._folder / f"episode_{episode.id:04d}"
        size = write_scene(folder, scene, self.flight.store.facts, limit=self.max_mb * MB)
        self._written.append(_Written(at=batch.at, episode=episode.id, folder=folder, size=size))

    def _gives_up(self, why: str) -> None:
        self._writes = False
        self.flight.store.note(f"No scenes are written for a replay after the run: {why}.")

    def _severity(self, written: _Written) -> float:
        """As it is known by now: an episode goes on after its scene was written."""
        return next((e.severity for e in self.flight.store.episodes if e.id == written.episode), 0.0)

    def _controls(self) -> int:
        replay = self.flight.taking_part(CounterfactualReplay)
        return CONTROLS if replay is None else replay.controls
