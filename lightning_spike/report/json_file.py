"""Writes and reads `report.json`, schema version 1.

All reports of version 1 have `run`, `episodes`, `causes` and `actions`. These keys were added; a reader must ignore
unknown ones:

- `run.batches`, `run.first_step` (above 0 after a resume), `run.device`, `run.error` (type and message, null where
  nothing was raised);
- on an episode `signal`, `noticed_step`, `recovery` (`whole | part | never | open`), `period` (batches between like
  episodes, or null), `severity` (robust standard deviations above the usual noise, at most 99), `not_replayed` (why it
  could not be replayed, or null) and `moments`, which says of `onset`, `noticed`, `peak` and `end` (null: never
  recovered) the `ordinal` (batches begun in the run before it), `step`, `epoch` and `batch_idx`;
- on a piece of evidence `weight`, the natural log of the likelihood ratio that it gives the cause, and `observation`
  and `level`, under which that weight stands in `diagnosis/weights.json`;
- `disabled`, the parts of the suite that broke and were switched off: `[{"part", "reason", "step"}]`;
- `remarks`, what could not be observed and why: `["…"]`;
- further values of `actions[].action`: `restore_best`, `replay`, `scene`, and on an action `at`, its moment as above;
- `files`, the names of what the run wrote beside this file: some of `signals`, `report.html`;
- `notes`, what the run could not write, and why: `["…"]`;
- `recorded`, what the ranking reads beside `signals/`, so that a later version can rank again (`report.rank_again`);
  null where nothing was kept;
- `nonfinite`, the numbers that are not finite: `{"/episodes/0/loss_peak": "NaN | Infinity | -Infinity"}`, each by its
  JSON Pointer (RFC 6901).

A number that is not finite is `null` in its own place; the file is strict JSON.
"""

import copy
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightning_spike.codec import to_plain
from lightning_spike.errors import UnreadableReportError
from lightning_spike.files import write_whole
from lightning_spike.records import Action, Episode
from lightning_spike.report.model import Report

SCHEMA_VERSION: Final = 1


def write_report(report: Report, path: Path, *, files: Sequence[str] = (), notes: Sequence[str] = ()) -> Path:
    """Writes the report atomically and waits until it is on the disk.

    Args:
        report: What to write.
        path: Where to.
        files: Names of the run's other files beside it.
        notes: Errors of files that could not be written.

    Raises:
        OSError: It could not be written; a report already there is untouched.
    """
    content = as_json(report, files=files, notes=notes)
    return write_whole(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads a report.json as plain dicts and lists.

    Raises:
        UnreadableReportError: The file is missing, is no report, or has another schema version.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        msg = (
            f"{path}: expected a report as JSON, found what cannot be read ({error}). "
            "Give a report.json that lightning_spike wrote."
        )
        raise UnreadableReportError(msg) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        msg = (
            f"{path}: expected schema_version {SCHEMA_VERSION}, found {version!r}. "
            "Read it with the lightning_spike that wrote it."
        )
        raise UnreadableReportError(msg)
    missing = [key for key in ("run", "episodes", "causes", "actions") if key not in content]
    if missing:
        msg = f"{path}: not a whole report, it lacks {', '.join(missing)}. Take it from the run's folder again."
        raise UnreadableReportError(msg)
    return dict(content)


def with_nonfinite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a read report with its non-finite numbers in their places.

    Raises:
        LookupError: `nonfinite` has a pointer to a missing place.
        TypeError: `nonfinite` has a pointer into a plain value.
        ValueError: `nonfinite` has a value that is no number.
    """
    whole: dict[str, Any] = copy.deepcopy(dict(content))
    for pointer, text in content.get("nonfinite", {}).items():
        *path, last = (key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])
        holder: Any = whole
        for key in path:
            holder = holder[_key(holder, key)]
        holder[_key(holder, last)] = float(text)
    return whole


def as_json(report: Report, *, files: Sequence[str] = (), notes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the report as strict JSON content; arguments as in `write_report`."""
    return strict_json(
        {
            "schema_version": SCHEMA_VERSION,
            "lightning_spike": importlib.import_module("lightning_spike").__version__,
            "run": _run(report),
            "episodes": [_episode(report, e) for e in report.episodes],
            "causes": to_plain(report.causes),
            "actions": [_action(a) for a in report.actions],
            "disabled": to_plain(report.disabled),
            "remarks": report.remarks,
            "files": files,
            "notes": notes,
            "recorded": to_plain(report.recorded),
        }
    )


def strict_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns content for `json.dumps(..., allow_nan=False)`, with non-finite numbers under `nonfinite`."""
    nonfinite: dict[str, str] = {}
    strict: dict[str, Any] = _strict(_plain(content), "", nonfinite)
    return strict | {"nonfinite": nonfinite}


def _run(report: Report) -> dict[str, Any]:
    return {
        "status": report.status,
        "steps": report.steps,
        "epochs": report.epochs,
        "seconds": report.seconds,
        "world_size": report.facts.world_size,
        "precision": report.facts.precision,
        "started": report.facts.started,
        "batches": report.batches,
        "first_step": report.facts.first_step,
        "device": report.device,
        "error": report.error,
    }


def _episode(report: Report, episode: Episode) -> dict[str, Any]:
    return {
        "id": episode.id,
        "kind": episode.kind,
        "onset_step": episode.onset.step,
        "peak_step": episode.peak.step,
        "end_step": None if episode.end is None else episode.end.step,
        "epoch": episode.onset.epoch,
        "batch_idx": episode.onset.batch_idx,
        "loss_before": episode.loss_before,
        "loss_peak": episode.loss_peak,
        "signal": episode.signal,
        "noticed_step": episode.noticed.step,
        "recovery": episode.recovery,
        "period": episode.period,
        "severity": episode.severity,
        "not_replayed": report.not_replayed.get(episode.id),
        "moments": {name: to_plain(getattr(episode, name)) for name in ("onset", "noticed", "peak", "end")},
        "causes": to_plain(report.causes_of.get(episode.id, ())),
    }


def _action(action: Action) -> dict[str, Any]:
    return {"action": action.action, "step": action.at.step, "at": to_plain(action.at), "detail": action.detail}


def _plain(value: Any) -> Any:  # noqa: PLR0911 - JSON is a union, one line for each of its kinds
    """Returns plain JSON types: NumPy's numbers become Python's, other objects their text."""
    match value:
        case None | bool():
            return value
        case np.generic() | np.ndarray():
            return _plain(value.tolist())
        case str():
            # A name may hold half a surrogate pair (undecodable bytes of a path), which UTF-8 cannot.
            return str(value).encode(errors="replace").decode()
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_plain(str(key)): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return _plain(str(value))


def _strict(value: Any, pointer: str, nonfinite: dict[str, str]) -> Any:
    """Returns the value with null for non-finite numbers, which are added to `nonfinite` by JSON Pointer."""
    match value:
        case float() if not math.isfinite(value):
            nonfinite[pointer] = json.dumps(value)
            return None
        case dict():
            escaped = {key: key.replace("~", "~0").replace("/", "~1") for key in value}
            return {key: _strict(item, f"{pointer}/{escaped[key]}", nonfinite) for key, item in value.items()}
        case list():
            return [_strict(item, f"{pointer}/{i}", nonfinite) for i, item in enumerate(value)]
        case _:
            return value


def _key(holder: Any, key: str) -> Any:
    """A step of a JSON Pointer as an index or key."""
    return int(key) if isinstance(holder, list) else key
