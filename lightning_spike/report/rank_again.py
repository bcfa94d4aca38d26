"""Ranks the causes of a finished run again, from its `report.json` and `signals/`."""

import dataclasses

import numpy as np

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.errors import UnreadableReportError
from lightning_spike.records import LayerRow, Moment, StepRow, ValidationPoint
from lightning_spike.report.model import Report
from lightning_spike.report.signals_file import Signals
from lightning_spike.store import TrainerStateStore


def rank_again(report: Report, signals: Signals | None) -> Report:
    """The report with the causes as this version ranks them; all else as it was.

    The same version ranks them as before. No training is run and nothing is written.

    Args:
        report: As `report_from` returns it.
        signals: The series that the run recorded.

    Raises:
        UnreadableReportError: The report or the signals lack what the ranking reads.
    """
    if report.recorded is None:
        msg = (
            "rank again: expected `recorded` in the report.json, found none: an older version wrote it. "
            "Print it as it is."
        )
        raise UnreadableReportError(msg)
    if signals is None:
        msg = (
            "rank again: expected the signals/ of the run beside its report.json, found none. Add the format 'signals'."
        )
        raise UnreadableReportError(msg)
    diagnosis = diagnose(store_of(report, signals))
    return dataclasses.replace(
        report,
        causes=diagnosis.overall,
        causes_of=diagnosis.per_episode,
        remarks=(*report.recorded.remarks, *diagnosis.remarks),
    )


def store_of(report: Report, signals: Signals) -> TrainerStateStore:
    """The store of a run as it was when the report was written, without the rows that it had let go of by then.

    Raises:
        UnreadableReportError: A table lacks a column.
    """
    recorded = report.recorded
    store = TrainerStateStore(report.facts)
    try:
        moments = _append_series(store, signals)
        _append_validations(store, signals)
    except KeyError as error:
        msg = f"rank again: expected signals/ with the column {error}, found none. Take it from the run's folder again."
        raise UnreadableReportError(msg) from error
    for signal, table in signals.layers.items():
        store.layer_names[signal] = table.names
        rows = zip(table.ordinals.tolist(), table.values, strict=True)
        for ordinal, values in rows:
            store.append_layer(LayerRow(at=moments.get(ordinal) or _unknown(ordinal), signal=signal, values=values))
    for episode in report.episodes:
        store.replace_episode(episode)
    store.note(*report.actions, *report.disabled)
    if recorded is not None:
        store.note(*recorded.findings, *recorded.experiments, *recorded.step_size_tests, *recorded.remarks)
    return store


def _append_series(store: TrainerStateStore, signals: Signals) -> dict[int, Moment]:
    places = {
        name: signals.series[name].astype(np.int64).tolist() for name in ("ordinal", "step", "epoch", "batch_idx")
    }
    columns = {name: column for name, column in signals.series.items() if name not in places}
    present = {name: signals.present(name) for name in columns}
    moments: dict[int, Moment] = {}
    for row, (ordinal, step, epoch, batch_idx) in enumerate(zip(*places.values(), strict=True)):
        at = moments[ordinal] = Moment(ordinal=ordinal, step=step, epoch=epoch, batch_idx=batch_idx)
        store.append(StepRow(at=at, values={n: float(c[row]) for n, c in columns.items() if present[n][row]}))
    return moments


def _append_validations(store: TrainerStateStore, signals: Signals) -> None:
    table = {name: column.tolist() for name, column in signals.validation.items()}
    for k, metric in enumerate(table["metric"]):
        at = Moment(**{name: table[name][k] for name in ("ordinal", "step", "epoch", "batch_idx")})
        train_loss = None if np.isnan(table["train_loss"][k]) else table["train_loss"][k]
        store.note(ValidationPoint(at=at, metric=metric, value=table["value"][k], train_loss=train_loss))


def _unknown(ordinal: int) -> Moment:
    return Moment(ordinal=ordinal, step=ordinal, epoch=0, batch_idx=0)
