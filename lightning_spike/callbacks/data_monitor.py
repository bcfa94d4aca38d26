"""`DataMonitor`: what is in the batches.

How large values are, how classes and sample weights are spread, and whether the inputs move.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import batch_path
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.batch_statistics import BatchStatistics
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.signals.batch import BatchRoles

REFERENCE: Final = 64
"""Batches at the beginning of the run (or of its resumed part) that later ones are compared with."""
SHARE: Final = 1 / 16
"""Of the newest batch in the moving average: it looks back over some thirty batches."""
MOST: Final = 5.0
"""Spreads at which a single batch's deviation is cut off: one bad batch is no drift."""


class DataMonitor(SpikeCallback):
    """Records statistics of every batch; what they show is evidence for the ranking, and is written to `signals/`.

    For every floating tensor `batch/<leaf>/mean`, `std`, `max_abs`, `nonfinite`, `zeros`; for an integer target or
    input (tokens) `distinct`, `entropy`, `largest`, `longest_run` and the vector `histogram` (classes modulo 64); for
    sample weights also `ess` and `max_share`; see `signals.batch`. For inputs also `batch/<leaf>/drift`: how far the
    moving average of mean and log spread (of tokens: of the roots of their counts) over the last thirty or so batches,
    those before this one, lies from the run's first 64, in standard errors: around 1 where the data stay as they are.

    All batches are measured, since the one that matters is not known beforehand. A few kernels for each tensor, nothing
    blocks. `BadBatchDumper` measures the same where it is alone; where both say which part of a batch is what, the
    later in the list of callbacks wins.

    Args:
        input: Path of the input in a batch where the convention does not fit: keys and positions joined by dots, as
            `"image"` or `"0.x"`. What is then neither input nor target nor weight is passed over. By convention all
            that is neither target nor weight.
        target: Path of the target. By convention the last tensor of a tuple or list, or what is called label(s),
            target(s) or y.
        weight: Path of the sample weights; by convention what is called weight(s) or sample_weight(s).

    Raises:
        ConfigurationError: An argument is neither a path nor None.
    """

    def __init__(self, input: str | None = None, target: str | None = None, weight: str | None = None) -> None:  # noqa: A002 - the contract's word
        self.roles = BatchRoles(
            input=batch_path("DataMonitor(input)", input),
            target=batch_path("DataMonitor(target)", target),
            weight=batch_path("DataMonitor(weight)", weight),
        )
        self._drifts: dict[str, _Drift] = {}

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._drifts = {}
        self.flight.share(BatchStatistics, BatchStatistics, trainer, module).take_roles(self.roles)

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        for leaf, drift in self._drifts.items():
            if (distance := drift.distance()) is not None:
                self.flight.recorder.put(f"batch/{leaf}/drift", distance)

    @override
    def judge(self, arrival: Arrival) -> None:
        values = arrival.row.values
        for signal, mean in values.items():
            if signal.startswith("batch/input") and signal.endswith("/mean"):
                leaf = signal.removeprefix("batch/").removesuffix("/mean")
                spread = values.get(f"batch/{leaf}/std", math.nan)
                if math.isfinite(mean) and math.isfinite(spread):
                    self._add(leaf, [mean, math.log(max(spread, 1e-30))], _furthest, arrival)
        for row in arrival.layers:
            if row.signal.startswith("batch/input") and row.signal.endswith("/histogram"):
                leaf = row.signal.removeprefix("batch/").removesuffix("/histogram")
                self._add(leaf, np.sqrt(row.values), _together, arrival)

    def _add(self, leaf: str, values: npt.ArrayLike, joined: "_Joined", arrival: Arrival) -> None:
        self._drifts.setdefault(leaf, _Drift(joined)).add(np.asarray(values, dtype=np.float64), weight=_size(arrival))


_Joined = Callable[[npt.NDArray[np.float64]], float]
"""What makes one number of several statistics' distances, so that it is around 1 where nothing moves."""


def _furthest(away: npt.NDArray[np.float64]) -> float:
    return float(np.abs(away).max())


def _together(away: npt.NDArray[np.float64]) -> float:
    """Root of the mean square: the furthest of 64 would be far where nothing moves.

    Of the kinds of token that occur at all.
    """
    moving = away[away != 0.0]
    return float(np.sqrt(np.mean(np.square(moving)))) if moving.size else 0.0


class _Drift:
    """How far an input's statistics have moved from where they began.

    Of each the mean and spread over the reference, and the moving average since.
    """

    ERROR: Final = math.sqrt(SHARE / (2 - SHARE) + 1 / REFERENCE)
    """Standard error of the moving average less the reference's mean, in spreads between single batches."""

    def __init__(self, joined: _Joined) -> None:
        self._joined = joined
        self._count = 0
        self._mean = self._squares = self._moving = np.zeros(1)

    def add(self, values: npt.NDArray[np.float64], weight: float) -> None:
        if self._count < REFERENCE:  # Welford
            self._count += 1
            step = values - self._mean
            self._mean = self._mean + step / self._count
            self._squares = self._squares + step * (values - self._mean)
            return
        spread = np.sqrt(self._squares / (self._count - 1))
        least = np.maximum(1e-6 * np.abs(self._mean), 1e-12)
        away = np.clip((values - self._mean) / np.maximum(spread, least) * weight, -MOST, MOST)
        self._moving = self._moving + SHARE * (away - self._moving)

    def distance(self) -> float | None:
        """In standard errors, over the statistics together; `None` while the reference is being made."""
        return None if self._count < REFERENCE else self._joined(self._moving) / self.ERROR


def _size(arrival: Arrival) -> float:
    """A short batch deviates by more: its deviation counts for less by the root of its share."""
    size, usual = arrival.row.batch_size, arrival.row.usual_batch_size
    return 1.0 if not size or not usual else math.sqrt(size / usual)
