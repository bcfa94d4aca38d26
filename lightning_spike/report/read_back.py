"""The report of a run that is over, from the files that it wrote: the way back of `report.json` and `signals/`.

What was written comes back as it was: the printed report is the same, character by character, in a terminal of the same
width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightning_spike.codec import from_plain
from lightning_spike.errors import UnreadableReportError
from lightning_spike.records import (
    Action,
    Disabled,
    Episode,
    EpisodeKind,
    Moment,
    Recovery,
    RunFacts,
    RunStatus,
    Verdict,
)
from lightning_spike.report.json_file import read_report, with_nonfinite
from lightning_spike.report.model import Curve, Recorded, Report, suspects_of
from lightning_spike.report.rank_again import rank_again
from lightning_spike.report.signals_file import Signals, read_signals
from lightning_spike.report.terminal import TerminalReport

PLACES: Final = ("report.json", "spike/report.json")
"""Paths of the report in its `dirpath` and in the folder above the default one."""


def read_back(place: str | Path, *, again: bool = False) -> TerminalReport:
    """The report that a run printed, to be printed again.

    Of the files beside report.json those count that it names, so that what another run left there is not taken for this
    one's; one that is gone by now is left out. Signals that cannot be read cost the curves, and a note says so.

    Args:
        place: As of `find_report`.
        again: Rank the causes again, with what this version knows.

    Raises:
        UnreadableReportError: There is no report, it is broken, or its schema is one that this version cannot read.
    """
    path = find_report(place)
    content = read_report(path)
    beside = [path.parent / name for name in content.get("files", ("signals", "report.html"))]
    notes = list(content.get("notes", ()))
    try:
        signals = next((read_signals(file) for file in beside if file.name == "signals" and file.is_dir()), None)
    except OSError as error:
        signals = None
        notes.append(f"the curves are missing, signals could not be read: {error}")
    try:
        report = report_from(with_nonfinite(content), signals)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a part that is not as written leads to
        msg = (
            f"{path}: expected a whole report, found a part missing or wrong ({type(error).__name__}: {error}). "
            "Take it from the run's folder again."
        )
        raise UnreadableReportError(msg) from error
    if again:
        report = rank_again(report, signals)
    return TerminalReport(report=report, files=[path, *(file for file in beside if file.exists())], notes=notes)


def find_report(place: str | Path) -> Path:
    """The report.json of a run.

    Args:
        place: The folder it is in, the folder above that where it is called `spike`, or the file itself.

    Raises:
        UnreadableReportError: There is none.
    """
    place = Path(place)
    if place.is_file():
        return place
    for name in PLACES:
        if (place / name).is_file():
            return place / name
    found = "a folder with neither" if place.is_dir() else "nothing of that name"
    msg = (
        f"{place}: expected a folder with {' or '.join(PLACES)}, found {found}. "
        "Give the dirpath of the run's RootCauseReport, or the report.json itself."
    )
    raise UnreadableReportError(msg)


def report_from(content: Mapping[str, Any], signals: Signals | None = None) -> Report:
    """The report as it was before it was written.

    The keys that were added to version 1 may be missing: where there are no `moments`, the batches are counted by their
    steps. Of the run's settings only those come back that a report shows.

    Args:
        content: As `read_report` returns it; with its numbers that are not finite where it went through
            `with_nonfinite`.
        signals: The curves; without them the report has none.

    Raises:
        LookupError: A key of the schema is missing.
        TypeError: A part is of another kind than the schema says.
        ValueError: A kind, a family, a status or a recovery is none that this version knows.
    """
    run = content["run"]
    actions = tuple(_action(a) for a in content["actions"])
    recorded = from_plain(Recorded, content["recorded"]) if content.get("recorded") is not None else None
    return Report(
        status=RunStatus(run["status"]),
        error=run.get("error"),
        steps=run["steps"],
        batches=run.get("batches", run["steps"]),
        epochs=run["epochs"],
        seconds=run["seconds"],
        device=run.get("device"),
        facts=from_plain(RunFacts, run) if recorded is None else recorded.facts,
        episodes=tuple(_episode(e) for e in content["episodes"]),
        causes=_verdicts(content["causes"]),
        causes_of={e["id"]: _verdicts(e["causes"]) for e in content["episodes"]},
        not_replayed={e["id"]: e["not_replayed"] for e in content["episodes"] if e.get("not_replayed") is not None},
        actions=actions,
        suspects=tuple(suspects_of(actions)),
        disabled=from_plain(tuple[Disabled, ...], content.get("disabled", ())),
        remarks=tuple(content.get("remarks", ())),
        loss=_curve(signals, "loss"),
        rates=tuple(c for s in _series(signals) if s.startswith("lr-") and (c := _curve(signals, s)) is not None),
        grad_norm=_curve(signals, "grad_norm"),
        validation=_validation(signals),
        recorded=recorded,
    )


def _episode(content: Mapping[str, Any]) -> Episode:
    return Episode(
        id=content["id"],
        kind=EpisodeKind(content["kind"]),
        onset=_moment_of(content, "onset"),
        noticed=_moment_of(content, "noticed"),
        peak=_moment_of(content, "peak"),
        end=None if content["end_step"] is None else _moment_of(content, "end"),
        loss_before=content["loss_before"],
        loss_peak=content["loss_peak"],
        recovery=Recovery(content.get("recovery", Recovery.OPEN)),
        signal=content.get("signal", "loss"),
        period=content.get("period"),
        severity=content.get("severity", 0.0),
    )


def _moment_of(episode: Mapping[str, Any], name: str) -> Moment:
    at = episode.get("moments", {}).get(name)
    if at is not None:
        return from_plain(Moment, at)
    return _by_step(episode.get(f"{name}_step", episode["onset_step"]), episode["epoch"], episode["batch_idx"])


def _by_step(step: int, epoch: int = 0, batch_idx: int = 0) -> Moment:
    return Moment(ordinal=step, step=step, epoch=epoch, batch_idx=batch_idx)


def _verdicts(contents: object) -> tuple[Verdict, ...]:
    return from_plain(tuple[Verdict, ...], contents)


def _action(content: Mapping[str, Any]) -> Action:
    at = from_plain(Moment, content["at"]) if "at" in content else _by_step(content["step"])
    return Action(action=content["action"], at=at, detail=content["detail"])


def _series(signals: Signals | None) -> tuple[str, ...]:
    return () if signals is None else tuple(signals.series)


def _curve(signals: Signals | None, name: str) -> Curve | None:
    """The rows in which the signal had a value, be it NaN."""
    if signals is None or name not in signals.series:
        return None
    ordinals, values = signals.series["ordinal"], signals.series[name].astype(np.float64)
    held = signals.present(name)
    if not held.any():
        return None
    steps = signals.series["step"][held].astype(np.int64)
    return Curve(name=name, ordinals=ordinals[held].astype(np.int64), steps=steps, values=values[held])


def _validation(signals: Signals | None) -> tuple[Curve, ...]:
    """One curve for each metric, in order of first appearance."""
    if signals is None:
        return ()
    table = signals.validation
    chosen = {str(metric): table["metric"] == metric for metric in dict.fromkeys(table["metric"].tolist())}
    return tuple(
        Curve(
            name=metric,
            ordinals=table["ordinal"][rows].astype(np.int64),
            steps=table["step"][rows].astype(np.int64),
            values=table["value"][rows].astype(np.float64),
        )
        for metric, rows in chosen.items()
    )
