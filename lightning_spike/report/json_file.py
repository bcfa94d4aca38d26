"""`report.json`: the report for programs, schema version 1.

Beyond what every reader of version 1 may rely on (`run`, `episodes`, `causes`, `actions`), these keys were added; a reader must bear further ones:

- `run.batches`, `run.first_step` (above 0 after a resume), `run.device`, `run.error` (type and message, null where nothing was raised);
- on an episode `signal`, `noticed_step`, `recovery` (`whole | part | never | open`), `period` (batches between like episodes, or null) and `severity`
  (robust standard deviations above the usual noise, at most 99);
- on a piece of evidence `weight`, the natural log of the likelihood ratio that it gives the cause;
- `disabled`, the parts of the suite that broke and were switched off: `[{"part", "reason", "step"}]`;
- `remarks`, what could not be observed and why: `["…"]`;
- further values of `actions[].action`: `restore_best`, `replay`.

A number that is not finite is `null`; the file is strict JSON.
"""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightning_spike.errors import UnreadableReportError
from lightning_spike.files import write_whole
from lightning_spike.records import Action, Disabled, Episode, Evidence, Verdict
from lightning_spike.report.model import Report

__all__ = ["SCHEMA_VERSION", "as_json", "read_report", "write_report"]

SCHEMA_VERSION: Final = 1


def write_report(report: Report, path: Path) -> Path:
    """Write the report whole or not at all, and wait until it is on the disk.

    Raises:
        OSError: It could not be written; a report already there is untouched.
    """
    return write_whole(path, json.dumps(as_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_report(path: str | Path) -> dict[str, Any]:
    """A report.json as plain dicts and lists.

    Raises:
        UnreadableReportError: There is no such file, it is no report, or its schema is one that this version cannot read.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        msg = (
            f"{path}: cannot be read as a report ({error}). Give the path of a report.json that lightning_spike wrote."
        )
        raise UnreadableReportError(msg) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        msg = f"{path}: expected schema_version {SCHEMA_VERSION}, found {version!r}. Read it with the lightning_spike that wrote it."
        raise UnreadableReportError(msg)
    missing = [key for key in ("run", "episodes", "causes", "actions") if key not in content]
    if missing:
        msg = f"{path}: not a whole report, it lacks {', '.join(missing)}. Take it from the run's folder again."
        raise UnreadableReportError(msg)
    return dict(content)


def as_json(report: Report) -> dict[str, Any]:
    """The report as what `json.dumps(..., allow_nan=False)` takes."""
    plain: dict[str, Any] = _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "lightning_spike": importlib.import_module("lightning_spike").__version__,
            "run": _run(report),
            "episodes": [_episode(e, report.causes_of.get(e.id, ())) for e in report.episodes],
            "causes": [_verdict(v) for v in report.causes],
            "actions": [_action(a) for a in report.actions],
            "disabled": [_disabled(d) for d in report.disabled],
            "remarks": report.remarks,
        }
    )
    return plain


def _run(report: Report) -> dict[str, Any]:
    return {
        "status": report.status,
        "steps": report.steps,
        "epochs": report.epochs,
        "seconds": round(report.seconds, 3),
        "world_size": report.facts.world_size,
        "precision": report.facts.precision,
        "started": report.facts.started,
        "batches": report.batches,
        "first_step": report.facts.first_step,
        "device": report.device,
        "error": report.error,
    }


def _episode(episode: Episode, causes: Sequence[Verdict]) -> dict[str, Any]:
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
        "causes": [_verdict(v) for v in causes],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "cause": verdict.cause,
        "family": verdict.family,
        "probability": verdict.probability,
        "episodes": verdict.episodes,
        "confirmed": verdict.confirmed,
        "summary": verdict.summary,
        "evidence": [_evidence(e) for e in verdict.evidence],
        "fixes": verdict.fixes,
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "signal": evidence.signal,
        "step": evidence.step,
        "observed": evidence.observed,
        "expected": evidence.expected,
        "text": evidence.text,
        "weight": evidence.weight,
    }


def _action(action: Action) -> dict[str, Any]:
    return {"action": action.action, "step": action.at.step, "detail": action.detail}


def _disabled(disabled: Disabled) -> dict[str, Any]:
    return {"part": disabled.part, "reason": disabled.reason, "step": disabled.step}


def _plain(value: Any) -> Any:  # noqa: ANN401, PLR0911 - JSON is a union, one line for each of its kinds
    """As JSON knows it: non-finite numbers become null, NumPy's numbers Python's, and what JSON has no form for its text."""
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
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {_plain(str(key)): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return _plain(str(value))
