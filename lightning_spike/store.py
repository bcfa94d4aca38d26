"""`TrainerStateStore`, the shared data of one run, and `History`, the bounded series in it.

`append`, `note` and `replace_episode` write, all else reads. The store needs neither torch nor Lightning, so diagnosis
and report run without a trainer. A trainer only carries the store (`of`).
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_spike.experiments import Experiments, StepSizeTest
from lightning_spike.records import (
    Action,
    Disabled,
    Episode,
    Finding,
    LayerRow,
    Moment,
    RunFacts,
    StepRow,
    ValidationPoint,
)

ATTRIBUTE: Final = "_lightning_spike"
"""The attribute of the trainer under which the run's `Flight` hangs, which holds the store."""

FULL_ROWS: Final = 1 << 14
"""Rows a history holds before older ones are thinned: 16,384 steps of 20 signals take 3 MB."""

LAYER_ROWS: Final = 512
"""Vector-valued rows kept; with 300 parameters 0.6 MB."""

MAX_FINDINGS: Final = 1000
"""Maximum number of findings, and of actions."""

Array = npt.NDArray[np.float64]


class History:
    """Scalar series over the run, one row a batch.

    Recent rows in full, older ones thinned, marked stretches kept whole.

    A row is kept as it came; when `capacity` rows are reached, the unmarked rows of the older half are thinned to every
    2nd, 4th, 8th … one. So the memory is bounded for a run of any length, and what is left of the far past is evenly
    spaced.

    Args:
        capacity: Rows at which thinning sets in, at least 64.
    """

    def __init__(self, capacity: int = FULL_ROWS) -> None:
        self._capacity = capacity
        self._size = 0
        self._moments = np.zeros((capacity, 4), dtype=np.int64)
        self._columns: dict[str, Array] = {}
        self._present: dict[str, npt.NDArray[np.bool_]] = {}
        self._marked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self._size

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the series that have at least one value, in order of first appearance."""
        return tuple(self._columns)

    @property
    def ordinals(self) -> npt.NDArray[np.int64]:
        """`Moment.ordinal` of each row, ascending; shape `(len(self),)`. A view: do not write."""
        return self._moments[: self._size, 0]

    def append(self, row: StepRow) -> None:
        """Add a batch's row; rows come in order of their ordinal."""
        if self._size == self._capacity:
            self._thin()
        at = row.at
        self._moments[self._size] = (at.ordinal, at.step, at.epoch, at.batch_idx)
        for name, column in self._columns.items():
            column[self._size] = np.nan
            self._present[name][self._size] = False
        for name, value in row.values.items():
            self._put(name, value)
        if row.batch_size is not None:
            self._put("batch_size", row.batch_size)
        self._size += 1

    def keep(self, first: int, last: int) -> None:
        """Never thin the rows with ordinals from `first` to `last`; the most recent 200 such stretches are honoured."""
        self._marked = [*self._marked[-199:], (first, last)]

    def series(self, signal: str) -> Array:
        """All values of one signal, shape `(len(self),)`, NaN where a row had none. A view: do not write."""
        column = self._columns.get(signal)
        return np.full(self._size, np.nan) if column is None else column[: self._size]

    def between(self, signal: str, first: int, last: int) -> Array:
        """Values of the rows with ordinals in `[first, last]`; rows that were thinned out are not there."""
        low, high = np.searchsorted(self.ordinals, (first, last + 1))
        return self.series(signal)[low:high]

    def before(self, signal: str, ordinal: int, count: int) -> Array:
        """The last `count` finite values of rows before `ordinal`, oldest first."""
        values = self.series(signal)[: int(np.searchsorted(self.ordinals, ordinal))]
        return values[np.isfinite(values)][-count:]

    def at(self, signal: str, ordinal: int) -> float | None:
        """The value of one row, which may be NaN or ±Inf; `None` where the row is not held or had no such value."""
        index = int(np.searchsorted(self.ordinals, ordinal))
        if index >= self._size or self.ordinals[index] != ordinal or signal not in self._columns:
            return None
        return float(self._columns[signal][index]) if self._present[signal][index] else None

    def present(self, signal: str) -> npt.NDArray[np.bool_]:
        """Which rows had a value of this signal, finite or not; shape `(len(self),)`."""
        held = self._present.get(signal)
        return np.zeros(self._size, dtype=bool) if held is None else held[: self._size]

    def moment(self, ordinal: int) -> Moment | None:
        """The moment of the last row at or before `ordinal`, `None` where there is none."""
        index = int(np.searchsorted(self.ordinals, ordinal, side="right")) - 1
        return self._moment(index) if 0 <= index < self._size else None

    def moments(self) -> Iterator[Moment]:
        """The moments of all rows, in order."""
        return (self._moment(index) for index in range(self._size))

    def columns(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """Everything as named columns for writing: ordinal, step, epoch, batch_idx, then the signals; copies."""
        named = ("ordinal", "step", "epoch", "batch_idx")
        head = {name: self._moments[: self._size, i].copy() for i, name in enumerate(named)}
        return head | {name: self.series(name).copy() for name in self._columns}

    def _put(self, name: str, value: float) -> None:
        if name not in self._columns:
            self._columns[name] = np.full(self._capacity, np.nan)
            self._present[name] = np.zeros(self._capacity, dtype=bool)
        self._columns[name][self._size] = value
        self._present[name][self._size] = True

    def _moment(self, index: int) -> Moment:
        ordinal, step, epoch, batch_idx = (int(v) for v in self._moments[index])
        return Moment(ordinal=ordinal, step=step, epoch=epoch, batch_idx=batch_idx)

    def _thin(self) -> None:
        """Thin the older half to a quarter of the capacity.

        To every 2nd, 4th, 8th … ordinal, whichever first is few enough.
        """
        half, stride = self._size // 2, 2
        marked = self._is_marked()[:half]
        if (
            marked.sum() > self._capacity // 8
        ):  # nearly all is marked: the oldest marks are given up, or memory would grow
            self._marked = self._marked[len(self._marked) // 2 + 1 :]
            marked = self._is_marked()[:half]
            marked[: half - self._capacity // 8] = False
        while ((self.ordinals[:half] % stride == 0) | marked).sum() > self._capacity // 4:
            stride *= 2
        keep = np.ones(self._size, dtype=bool)
        keep[:half] = (self.ordinals[:half] % stride == 0) | marked
        kept = np.flatnonzero(keep)
        self._moments[: kept.size] = self._moments[kept]
        for column in (*self._columns.values(), *self._present.values()):
            column[: kept.size] = column[kept]
        self._size = int(kept.size)

    def _is_marked(self) -> npt.NDArray[np.bool_]:
        marked = np.zeros(self._size, dtype=bool)
        for first, last in self._marked:
            low, high = np.searchsorted(self.ordinals, (first, last + 1))
            marked[low:high] = True
        return marked


class TrainerStateStore:
    """The state of one run that all callbacks of the suite share; made anew for every `fit`.

    Get it with `TrainerStateStore.of(trainer)` from anywhere a trainer is at hand, e.g. to read the recorded series in
    a callback
    of your own. Everything in it is host memory and plain numbers: reading never touches the device and never blocks.
    """

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        """The settings of the run."""
        self.history = History()
        """The scalar series, one row a batch."""
        self.layers: dict[str, deque[LayerRow]] = {}
        """Vector-valued series by signal, the most recent rows only."""
        self.layer_names: dict[str, tuple[str, ...]] = {}
        """Names of the entries of each vector-valued series, by signal."""
        self.validations: list[ValidationPoint] = []
        self.findings: list[Finding] = []
        self.experiments: dict[int, Experiments] = {}
        """Results of the lab, by episode id."""
        self.step_size_tests: list[StepSizeTest] = []
        """Step-size tests that were made without an episode, oldest first."""
        self.actions: list[Action] = []
        self.disabled: list[Disabled] = []
        self.remarks: list[str] = []
        """Things about this run that a reader of the report must know: what could not be observed, and why."""
        self._episodes: dict[int, Episode] = {}

    @staticmethod
    def of(trainer: object) -> "TrainerStateStore":
        """The store of the fit that this trainer is in, or was last in.

        Raises:
            LookupError: No callback of the suite has been set up by this trainer in this process.
        """
        flight = vars(trainer).get(ATTRIBUTE)
        if flight is None:
            msg = (
                "TrainerStateStore.of(trainer): this trainer has no store. "
                "One is made when fit() sets up a lightning_spike callback."
            )
            raise LookupError(msg)
        store: TrainerStateStore = flight.store
        return store

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes so far, in order of onset, each in its newest version."""
        return tuple(sorted(self._episodes.values(), key=lambda e: (e.onset.ordinal, e.id)))

    def append(self, row: StepRow, layers: Iterable[LayerRow] = ()) -> None:
        """Take in a batch's row; rows come in order of their ordinal."""
        self.history.append(row)
        for layer_row in layers:
            self.append_layer(layer_row)

    def append_layer(self, row: LayerRow) -> None:
        """Take in a vector-valued row; those of one signal come in order of their ordinal."""
        self.layers.setdefault(row.signal, deque(maxlen=LAYER_ROWS)).append(row)

    def note(self, *items: ValidationPoint | Finding | Action | Disabled | Experiments | StepSizeTest | str) -> None:
        """Stores anything else; a string is a remark for the report and is stored once."""
        lists: dict[type, list[Any]] = {
            ValidationPoint: self.validations,
            Disabled: self.disabled,
            Finding: self.findings,
            Action: self.actions,
            StepSizeTest: self.step_size_tests,
        }
        for item in items:
            if isinstance(item, Experiments):
                self.experiments[item.episode] = item
            elif isinstance(item, str):
                self.remarks += [item] if item not in self.remarks else []
            else:
                stored = lists[type(item)]
                stored.append(item)
                if len(stored) > MAX_FINDINGS and not isinstance(item, ValidationPoint | Disabled):
                    del stored[MAX_FINDINGS // 2]  # readers need the first and the latest

    def replace_episode(self, episode: Episode) -> None:
        """Take in an episode, or the newer version of one with the same id; its stretch is kept from thinning."""
        self._episodes[episode.id] = episode
        last = (episode.end or episode.noticed).ordinal
        self.history.keep(episode.onset.ordinal - 64, last + 16)

    def layer_rows(self, signal: str, first: int, last: int) -> list[LayerRow]:
        """The vector-valued rows of one signal with ordinals in `[first, last]` that are still held."""
        rows = self.layers.get(signal, deque())
        inside = itertools.dropwhile(lambda r: r.at.ordinal < first, rows)
        return list(itertools.takewhile(lambda r: r.at.ordinal <= last, inside))
