"""What the examination of scenes found after the run: for the terminal, and as `replay.json`.

`replay.json`, schema version 1, is strict JSON; numbers that are not finite are null and stand in `nonfinite`, as in report.json:

- `lightning_spike` and `torch`, the versions that replayed; `config`, the files that the module was made from; `device`;
- `scenes`, one object each: `path` (beside this file), `started` (of the run, ISO 8601), `episode`, `kind`, `onset` (its moment), `seconds`, `examined`
  (false where it could not be run again), and `findings`: `[{"detector", "kind", "at", "detail"}]` as the lab gave them;
- `notes`, what a reader must know: another version of torch, say.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from lightning_spike.files import write_whole
from lightning_spike.records import Episode, Finding
from lightning_spike.report.json_file import strict_json
from lightning_spike.report.terminal import WIDEST, hanging, print_lines, title_line
from lightning_spike.report.wording import count, duration, loss_words

SCHEMA_VERSION: Final = 1
VERDICTS: Final = {
    "data": "the batch",
    "weights": "the weights",
    "both": "batch and weights together",
    "noise": "no more than the ordinary scatter",
    "not_reproduced": "does not come back",
}
"""What a split says, in words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """One scene, examined."""

    place: Path
    started: str
    """When the run began, ISO 8601."""
    episode: Episode
    batches: int
    """From the snapshot to the onset: how many were trained on again."""
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def examined(self) -> bool:
        """It could be run again."""
        return any(finding.kind != "not_run" for finding in self.findings)

    @property
    def split(self) -> Mapping[str, Any] | None:
        """The detail of the finding that says how much was the batch's doing."""
        return next((f.detail for f in self.findings if f.kind == "split"), None)


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
    split = scene.split
    if split is not None:
        yield hanging("   ", Text(f"{_run_again(scene, split)}, {duration(scene.seconds)} on {device}", style="dim"))
        yield hanging(
            "   ",
            Text.assemble(
                ("what made the loss jump: ", ""), (VERDICTS.get(split["verdict"], split["verdict"]), "bold green")
            ),
        )
    for finding in scene.findings:
        if finding.kind == "not_run":
            yield hanging("   ! ", Text(f"not run again: {finding.detail['why']}", style="yellow"))
        elif isinstance(finding.detail.get("text"), str):
            yield hanging("   • ", Text(finding.detail["text"]))


def _run_again(scene: Replayed, split: Mapping[str, Any]) -> str:
    if split["verdict"] == "not_reproduced":
        return f"{_batches(scene.batches)}, and there the loss is another"
    if split.get("exact"):
        return f"{_batches(scene.batches)}, with the same losses as in the training"
    return f"Not run again step by step: {split.get('why_not_exact') or 'no reason is known'}"


def _batches(n: int) -> str:
    return f"Run again: {n:,} {'batch' if n == 1 else 'batches'} from the last healthy snapshot"


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
        "batches": scene.batches,
        "examined": scene.examined,
        "findings": [
            {"detector": f.detector, "kind": f.kind, "at": dataclasses.asdict(f.at), "detail": f.detail}
            for f in scene.findings
        ],
    }
