"""Vector-valued series, an entry for each layer or parameter, about one episode.

How every entry stands to its own healthy values.
"""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.view import EpisodeView

ABSENT: Final = -1.0
"""What stands in these series for an entry that a row does not concern; sizes and shares are never negative."""
ROWS: Final = 32
"""Healthy rows that an expectation is made of."""
FEW: Final = 2
"""… without which there is none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Some rows of one series."""

    signal: str
    names: tuple[str, ...]
    ordinals: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """Shape `(rows, names)`; NaN where a row does not concern an entry, and where it was NaN itself."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerShift:
    """The entry of a series that has moved most."""

    name: str
    ordinal: int
    observed: float
    expected: float

    @property
    def factor(self) -> float:
        """Observed over expected; infinite where nothing was expected."""
        return self.observed / self.expected if self.expected > 0.0 else math.inf


def layer_table(view: EpisodeView, signal: str, first: int, last: int) -> LayerTable:
    """The rows with ordinals in `[first, last]` that are still held; empty where there are none.

    Rows of another length than the names are passed over.
    """
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
        before: Only rows before this ordinal, by default all up to some batches before the onset.

    Returns:
        Shape `(names,)`, NaN for entries without a finite value; `None` where fewer than two rows are held.
    """
    until = view.onset - GUARD if before is None else before
    table = layer_table(view, signal, 0, until - 1)
    ordinals = view.store.history.ordinals
    healthy = ordinals[view.healthy]
    fine = np.isin(table.ordinals, healthy)
    values = table.values[fine][-ROWS:]
    if len(values) < FEW:
        return None
    known = np.isfinite(values).any(axis=0)
    out = np.full(values.shape[1], np.nan)
    finite = np.where(np.isfinite(values), values, np.nan)
    out[known] = np.nanmedian(finite[:, known], axis=0)
    return out


def shifted_most(view: EpisodeView, signal: str, first: int, last: int, *, down: bool = False) -> LayerShift | None:
    """The entry whose factor against its usual value is highest (`down`.

    Lowest) among some rows; `None` where nothing can be compared.
    """
    usual = usual_of(view, signal)
    table = layer_table(view, signal, first, last)
    if usual is None or table.values.size == 0:
        return None
    known = np.isfinite(table.values) & (usual > 0.0)[None, :]
    if not known.any():
        return None
    ratios = np.where(known, table.values / np.where(usual > 0.0, usual, 1.0), np.inf if down else -np.inf)
    row, column = np.unravel_index(int(ratios.argmin() if down else ratios.argmax()), ratios.shape)
    return LayerShift(
        name=table.names[column],
        ordinal=int(table.ordinals[row]),
        observed=float(table.values[row, column]),
        expected=float(usual[column]),
    )
