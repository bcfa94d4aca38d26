"""Recorded series with one entry per layer or parameter: the rows around an episode and their usual values."""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.view import EpisodeView

ABSENT: Final = -1.0
"""Stands for an entry that was not measured in a row: sizes and shares are never negative, by definition."""
REFERENCE_ROWS: Final = 32
"""Healthy rows whose median is the usual value; engineering choice."""
MIN_REFERENCE_ROWS: Final = 2
"""Healthy rows without which no usual value is known; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Some rows of one series."""

    signal: str
    names: tuple[str, ...]
    ordinals: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """Shape `(rows, names)`; NaN for entries that were not measured or were NaN."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerShift:
    """The entry of a series that changed most."""

    name: str
    ordinal: int
    observed: float
    expected: float


def layer_table(view: EpisodeView, signal: str, first: int, last: int) -> LayerTable:
    """The recorded rows with ordinals in `[first, last]`, possibly none; rows of another length are left out."""
    names = view.store.layer_names.get(signal, ())
    rows = [row for row in view.store.layer_rows(signal, first, last) if len(row.values) == len(names)]
    values = np.array([row.values for row in rows], dtype=np.float64).reshape(len(rows), len(names))
    ordinals = np.array([row.at.ordinal for row in rows], dtype=np.int64)
    return LayerTable(signal=signal, names=names, ordinals=ordinals, values=np.where(values == ABSENT, np.nan, values))


def usual_of(view: EpisodeView, signal: str, before: int | None = None) -> npt.NDArray[np.float64] | None:
    """The median of every entry over the last healthy rows.

    Args:
        view: The episode.
        signal: The series.
        before: Only rows before this ordinal count; by default those up to some batches before the onset.

    Returns:
        Shape `(names,)`, NaN for entries without a finite value; `None` where fewer than two rows are held.
    """
    until = view.onset - GUARD if before is None else before
    table = layer_table(view, signal, 0, until - 1)
    healthy = np.isin(table.ordinals, view.store.history.ordinals[view.healthy])
    values = table.values[healthy][-REFERENCE_ROWS:]
    if len(values) < MIN_REFERENCE_ROWS:
        return None
    known = np.isfinite(values).any(axis=0)
    out = np.full(values.shape[1], np.nan)
    finite = np.where(np.isfinite(values), values, np.nan)
    out[known] = np.nanmedian(finite[:, known], axis=0)
    return out


def shifted_most(view: EpisodeView, signal: str, first: int, last: int, *, down: bool = False) -> LayerShift | None:
    """The entry that grew (or, with `down`, shrank) by the largest factor among some rows; `None` without one."""
    usual = usual_of(view, signal)
    table = layer_table(view, signal, first, last)
    if usual is None or table.values.size == 0:
        return None
    known = np.isfinite(table.values) & (usual > 0.0)[None, :]
    if not known.any():
        return None
    ratios = np.where(known, table.values / np.where(usual > 0.0, usual, 1.0), np.inf if down else -np.inf)
    row, column = np.unravel_index(int(ratios.argmin() if down else ratios.argmax()), ratios.shape)
    observed, expected = float(table.values[row, column]), float(usual[column])
    return LayerShift(name=table.names[column], ordinal=int(table.ordinals[row]), observed=observed, expected=expected)
