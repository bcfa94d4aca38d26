"""What the examination of scenes found after the run: for the terminal, and as `replay.json`.

`replay.json`, schema version 2, is strict JSON; numbers that are not finite are null and stand in `nonfinite`, as in
report.json:

- `lightning_spike` and `torch`, the versions that replayed; `config`, the files that the module was made from;
  `device`;
- `scenes`, one object each: `path` (beside this file), `started` (of the run, ISO 8601), `episode`, `kind`, `onset`
  (its moment), `seconds`, `examined` (false where it could not be replayed), `experiments` (a record of
  `lightning_spike.experiments`, written by `codec`) and `sentences`, the same in words;
- `notes`, what a reader must know: another version of torch, say.
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
from lightning_spike.diagnosis.judgement import SplitVerdict, split_verdict
from lightning_spike.experiments import Experiments
from lightning_spike.files import write_whole
from lightning_spike.records import Episode
from lightning_spike.report.json_file import strict_json
from lightning_spike.report.terminal import WIDEST, hanging, print_lines, title_line
from lightning_spike.report.wording import count, duration, loss_words

SCHEMA_VERSION: Final = 2
CAUSED_BY: Final = {
    SplitVerdict.DATA: "the batch",
    SplitVerdict.WEIGHTS: "the weights",
    SplitVerdict.BOTH: "batch and weights together",
    SplitVerdict.NOISE: "nothing: the loss is within its ordinary scatter",
    SplitVerdict.NOT_REPRODUCED: "something outside the training step",
    SplitVerdict.COMPUTATION: "a changed computation",
}
"""What a split gives the jump to, in words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """One scene, examined."""

    place: Path
    started: str
    """When the run began, ISO 8601."""
    episode: Episode
    experiments: Experiments
    seconds: float

    @property
    def examined(self) -> bool:
        """It could be replayed."""
        return self.experiments.not_run is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayReport:
    """All scenes that were examined; a rich renderable."""

    scenes: Sequence[Replayed]
    device: str
    configs: Sequence[Path]
    notes: Sequence[str] = ()
    file: Path | None = None
    """Where it was written."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich calls it."""
        options = options.update(width=min(options.max_width, WIDEST))
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
        yield hanging("   ", Text.assemble("what made the loss jump: ", (CAUSED_BY[verdict], "bold green")))
    rest = dataclasses.replace(found, replay=None)
    yield from (hanging("   • ", Text(sentence)) for sentence in sentences.about(rest))


def write_replay(report: ReplayReport, path: Path) -> Path:
    """Write `replay.json`, whole or not at all.

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
