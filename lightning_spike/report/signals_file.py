"""Writes and reads `signals/`: the recorded series as columns in NumPy's `.npz` format (a zip of arrays)."""

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_spike.files import whole_folder
from lightning_spike.store import TrainerStateStore

Array = npt.NDArray[np.generic]

README: Final = """\
# Recorded signals

Four tables as .npz files, each array a column; read them with NumPy:

    import numpy as np
    series = np.load("series.npz")
    series["step"], series["loss"]

- `series.npz`: one row for each recorded training batch. In a long run older rows are thinned evenly; those around an
  episode are complete. `ordinal` counts the batches of the run from 0; `step` is `trainer.global_step` as the batch
  began; `epoch`, `batch_idx`. The other columns are signals, float64, NaN where a batch had none: {signals}.
- `nan.npz`: the `ordinal`s of the batches in which a signal was itself NaN, by signal.
- `layers.npz`: vector-valued signals of the latest batches; for each signal `<signal>:names` (n), `<signal>:ordinal`
  (rows) and `<signal>:values` (rows, n), float32: {layers}.
- `validation.npz`: one row for each validation: `metric`, `value`, the mean training loss since the previous one
  (`train_loss`), and `ordinal`, `step`, `epoch`, `batch_idx` of the last training batch before it.
"""

REQUIRED_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"series": ("ordinal", "step"), "nan": (), "layers": (), "validation": ("metric", "value", "ordinal", "step")}
)
"""The tables and their required columns."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTable:
    """One vector-valued signal."""

    names: tuple[str, ...]
    ordinals: npt.NDArray[np.int64]
    """Shape `(rows,)`."""
    values: npt.NDArray[np.float32]
    """Shape `(rows, len(names))`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signals:
    """The content of `signals/`."""

    series: Mapping[str, Array]
    """Columns of equal length, one row a batch."""
    nan: Mapping[str, npt.NDArray[np.int64]]
    """Ordinals of the batches in which a signal was itself NaN; any other NaN in its column is a missing value."""
    layers: Mapping[str, LayerTable]
    """By signal."""
    validation: Mapping[str, Array]
    """Columns of equal length, one row a validation."""

    def present(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows in which a signal had a value, be it NaN; shape as its column."""
        was_nan = np.isin(self.series["ordinal"], self.nan.get(name, ()))
        held: npt.NDArray[np.bool_] = ~np.isnan(self.series[name].astype(np.float64)) | was_nan
        return held


def write_signals(store: TrainerStateStore, folder: Path) -> Path:
    """Writes all recorded series atomically; an older folder is replaced.

    Returns:
        `folder`.

    Raises:
        OSError: It could not be written.
    """
    tables = {
        "series": store.history.columns(),
        "nan": _nan(store),
        "layers": _layers(store),
        "validation": _validation(store),
    }
    with whole_folder(folder) as hidden:
        for name, columns in tables.items():
            _write_table(hidden / f"{name}.npz", columns)
        both = (store.history.signals, store.layers)
        signals, layers = (", ".join(f"`{name}`" for name in names) or "none" for names in both)
        (hidden / "README.md").write_text(README.format(signals=signals, layers=layers), encoding="utf-8")
    return folder


def read_signals(folder: str | Path) -> Signals:
    """Reads the files of `write_signals`.

    Raises:
        OSError: The folder or one of its tables cannot be read.
    """
    tables = {name: _read_table(Path(folder) / f"{name}.npz", needed) for name, needed in REQUIRED_COLUMNS.items()}
    columns = tables["layers"]
    signals = [name.removesuffix(":names") for name in columns if name.endswith(":names")]
    layers = {
        s: LayerTable(
            names=tuple(str(n) for n in columns[f"{s}:names"]),
            ordinals=columns[f"{s}:ordinal"].astype(np.int64),
            values=columns[f"{s}:values"].astype(np.float32),
        )
        for s in signals
    }
    return Signals(series=tables["series"], nan=tables["nan"], layers=layers, validation=tables["validation"])


def _nan(store: TrainerStateStore) -> dict[str, Array]:
    history = store.history
    measured = {name: history.present(name) & np.isnan(history.series(name)) for name in history.signals}
    return {name: history.ordinals[rows].copy() for name, rows in measured.items() if rows.any()}


def _layers(store: TrainerStateStore) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for signal, rows in store.layers.items():
        names = store.layer_names.get(signal, ())
        fitting = [row for row in rows if len(row.values) == len(names)]
        columns[f"{signal}:names"] = np.array(names, dtype=np.str_)
        columns[f"{signal}:ordinal"] = np.array([row.at.ordinal for row in fitting], dtype=np.int64)
        values = np.array([row.values for row in fitting], dtype=np.float32)
        columns[f"{signal}:values"] = values.reshape(len(fitting), len(names))
    return columns


def _validation(store: TrainerStateStore) -> dict[str, Array]:
    points = store.validations
    place = {
        name: np.array([getattr(p.at, name) for p in points], dtype=np.int64)
        for name in ("ordinal", "step", "epoch", "batch_idx")
    }
    losses = [np.nan if p.train_loss is None else p.train_loss for p in points]
    return {
        **place,
        "metric": np.array([p.metric for p in points], dtype=np.str_),
        "value": np.array([p.value for p in points], dtype=np.float64),
        "train_loss": np.array(losses, dtype=np.float64),
    }


def _write_table(path: Path, columns: Mapping[str, Array]) -> None:
    """Writes a table as `numpy.savez_compressed` does, whose keywords cannot have every name (such as "file")."""
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as handle:
                np.lib.format.write_array(handle, np.asarray(column), allow_pickle=False)


def _read_table(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            columns = {name.removesuffix(".npy"): _read_column(archive, name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        msg = f"{path} is no table of signals: {error}"
        raise OSError(msg) from error
    missing = [name for name in needed if name not in columns]
    if missing:
        msg = f"{path} lacks {', '.join(missing)}"
        raise OSError(msg)
    return columns


def _read_column(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as handle:
        column: Array = np.lib.format.read_array(handle, allow_pickle=False)
        return column
