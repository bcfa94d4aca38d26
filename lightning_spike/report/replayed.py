"""Renders the results of replays after the run for the terminal, and writes them as `replay.json`.

`replay.json`, schema version 2, is strict JSON; numbers that are not finite are null and stand in `nonfinite`, as in
report.json:

- `lightning_spike` and `torch`, the versions that replayed; `config`, the files that the module was made from;
  `device`;
- `scenes`, one object each: `path` (beside this file), `started` (of the run, ISO 8601), `episode`, `kind`, `onset`
  (its moment), `seconds`, `examined` (false where it could not be replayed), `experiments` (a record of
  `lightning_spike.experiments`, written by `codec`) and `sentences`, the same in words;
- `notes`, warnings, such as another version of torch.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from lightning_spike.codec import to_plain
from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.judgement import split_verdict
from lightning_spike.experiments import Experiments
from lightning_spike.files import write_whole
from lightning_spike.records import Episode
from lightning_spike.report.json_file import strict_json
from lightning_spike.report.terminal import MAX_WIDTH, hanging, print_lines, title_line
from lightning_spike.report.wording import count, duration, loss_words

SCHEMA_VERSION: Final = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """The result of one scene."""

    place: Path
    started: str
    """When the run began, ISO 8601."""
    episode: Episode
    experiments: Experiments
    seconds: float

    @property
    def examined(self) -> bool:
        """Whether the scene could be replayed."""
        return self.experiments.not_run is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayReport:
    """The results of all scenes; a rich renderable."""

    scenes: Sequence[Replayed]
    device: str
    configs: Sequence[Path]
    notes: Sequence[str] = ()
    file: Path | None = None
    """The file it was written to."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich calls it."""
        options = options.update(width=min(options.max_width, MAX_WIDTH))
        yield from print_lines(Group(*self._parts(options.max_width)), console, options)

    def _parts(self, width: int) -> Iterator[RenderableType]:
        yield Text()
        yield title_line(f"replay of {count(len(self.scenes), 'episode')}", width)
        for scene in self.scenes:
            yield Text()
            yield from _scene(scene, self.device)
        yield Text()
        yield from (hanging("! ", Text(note, style="yellow")) for note in self.notes)
        if self.file is not None:
            yield Text.assemble(("File: ", "bold"), str(self.file))
            yield Text()


def _scene(scene: Replayed, device: str) -> Iterator[RenderableType]:
    at = scene.episode.onset
    where = f"at step {at.step:,} (epoch {at.epoch}, batch {at.batch_idx})"
    yield Text.assemble(
        (f"Episode {scene.episode.id}: {scene.episode.kind} {where}", "bold"), f"  {loss_words(scene.episode)}"
    )
    found = scene.experiments
    verdict = split_verdict(found)
    if not scene.examined:
        yield hanging("   ! ", Text(f"not replayed: {found.not_run}", style="yellow"))
        return
    if found.replay is not None:
        took = f"{sentences.replay(found.replay)} It took {duration(scene.seconds)} on {device}."
        yield hanging("   ", Text(took, style="dim"))
    if verdict is not None:
        yield hanging("   ", Text.assemble("what made the loss jump: ", (sentences.CAUSED_BY[verdict], "bold green")))
    said = None if found.replay is None else sentences.replay(found.replay)
    yield from (hanging("   • ", Text(sentence)) for sentence in sentences.about(found) if sentence != said)


def write_replay(report: ReplayReport, path: Path) -> Path:
    """Writes `replay.json` atomically.

    Raises:
        OSError: It could not be written; what was there before is untouched.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "lightning_spike": importlib.import_module("lightning_spike").__version__,
        "torch": torch.__version__,
        "config": [str(config) for config in report.configs],
        "device": report.device,
        "scenes": [_as_json(scene, path.parent) for scene in report.scenes],
        "notes": report.notes,
    }
    return write_whole(path, json.dumps(strict_json(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _as_json(scene: Replayed, beside: Path) -> dict[str, Any]:
    return {
        "path": scene.place.relative_to(beside).as_posix(),
        "started": scene.started,
        "episode": scene.episode.id,
        "kind": scene.episode.kind,
        "onset": dataclasses.asdict(scene.episode.onset),
        "seconds": round(scene.seconds, 3),
        "examined": scene.examined,
        "experiments": to_plain(scene.experiments),
        "sentences": list(sentences.about(scene.experiments)),
    }
