"""`SceneRecorder`: writes the scene of an episode to disk, for a replay after the run."""

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
"""Control batches of a scene without a `CounterfactualReplay`, as its default."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    at: Moment
    episode: int
    folder: Path
    size: int


class SceneRecorder(SpikeCallback):
    """Writes the scene of each episode to disk, for `lightning-spike replay` after the run.

    Each new spike, divergence or non-finite loss gets a folder under `<dirpath>/scenes`. It holds the last healthy
    snapshot, the recorded batches (about 80) with their random states, learning rates, losses, and the current weights
    and optimizer states. Its size is that of the batches plus twice weights and optimizer states. It is all tensors and
    JSON: reading it runs no code from the file.

    The training is not changed. Writing blocks for as long as the disk takes, and only at an episode. Nothing is
    written with more than one rank, or if batches hold objects that cannot be restored (sparse tensors, functions,
    classes made inside functions). The report then says why.

    Args:
        dirpath: Parent folder of `scenes/`; by default `<logger.log_dir, else trainer.default_root_dir>/spike`.
            A scene replaces the one of the same episode number of an earlier run.
        max_scenes: Maximum number of scenes per fit. Beyond it a more severe episode replaces the least severe one.
        max_mb: Maximum size of a scene in megabytes (10^6 bytes). A larger one is not written, and the report says so.

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
            self._give_up("several ranks are replayed during the run only")

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        for episode in changed:
            if self._writes and episode.kind in EXAMINED and episode.id not in self._seen:
                self._seen.add(episode.id)
                self._add_scene(batch, episode)

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

    def _add_scene(self, batch: TrainingBatch, episode: Episode) -> None:
        least = min(self._written, key=self._severity) if len(self._written) >= self.max_scenes else None
        if least is not None and episode.severity <= self._severity(least):
            return
        try:
            self._write(batch, episode)
        except TooLarge:
            self._give_up(f"one would take more than {self.max_mb:g} MB (max_mb)")
        except CannotReplay as reason:
            self.flight.store.note(f"The scene of episode {episode.id} was not written: {reason}.")
        except OSError as error:  # a full or read-only disk must not end the training
            self._give_up(f"{self._folder} could not be written to: {error}")
        else:
            if least is not None:
                self._written.remove(least)
                shutil.rmtree(least.folder, ignore_errors=True)

    def _write(self, batch: TrainingBatch, episode: Episode) -> None:
        replay = self.flight.taking_part(CounterfactualReplay)
        controls = CONTROLS if replay is None else replay.controls
        scene = live_scene(batch, episode, self._witnesses, controls=controls)
        folder = self._folder / f"episode_{episode.id:04d}"
        size = write_scene(folder, scene, self.flight.store.facts, limit=self.max_mb * MB)
        self._written.append(_Written(at=batch.at, episode=episode.id, folder=folder, size=size))

    def _give_up(self, why: str) -> None:
        self._writes = False
        self.flight.store.note(f"No scenes are written for a replay after the run: {why}.")

    def _severity(self, written: _Written) -> float:
        """The episode's current severity; it can grow after the scene was written."""
        return next((e.severity for e in self.flight.store.episodes if e.id == written.episode), 0.0)
