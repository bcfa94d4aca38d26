"""`DataMonitor`: value statistics, class and weight distribution, and input drift of the batches."""

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

REFERENCE_BATCHES: Final = 64
"""Batches at the start of the run (or of its resumed part) that later batches are compared with."""
SMOOTHING: Final = 1 / 16
"""Weight of the newest batch in the moving average, which covers about thirty batches."""
MAX_DEVIATION: Final = 5.0
"""Standard deviations at which a batch's deviation is clipped: one bad batch is no drift."""


class DataMonitor(SpikeCallback):
    """Records statistics of every batch, as evidence for the ranking and in `signals/`.

    - Every floating tensor: `batch/<leaf>/mean`, `std`, `max_abs`, `nonfinite`, `zeros`.
    - Integer targets and inputs (tokens): `distinct`, `entropy`, `largest`, `longest_run` and the vector `histogram`
      (classes modulo 64).
    - Sample weights: also `ess` and `max_share`; see `signals.batch`.
    - Inputs: also `batch/<leaf>/drift`, the distance of the moving average from the first 64 batches, in standard
      errors; about 1 for stationary data. The average is of mean and log standard deviation (tokens: square roots of
      the counts) over about thirty batches before this one.

    Every batch is measured. That takes a few kernels per tensor, and nothing blocks. `BadBatchDumper` measures the same
    if it is alone. If both define the parts of a batch, the later one in the list of callbacks wins.

    Args:
        input: Path of the input in a batch: keys and positions joined by dots, such as `"image"` or `"0.x"`. Everything
            that is then no input, target or weight is ignored. By default all that is neither target nor weight.
        target: Path of the target. By default the last tensor of a tuple or list, or the entry label(s), target(s)
            or y.
        weight: Path of the sample weights. By default the entry weight(s) or sample_weight(s).

    Raises:
        ConfigurationError: An argument is neither a path nor None.
    """

    def __init__(
        self,
        input: str | None = None,  # noqa: A002 - the contract's word
        target: str | None = None,
        weight: str | None = None,
    ) -> None:
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
                    self._add(leaf, [mean, math.log(max(spread, 1e-30))], _maximum, arrival)
        for row in arrival.layers:
            if row.signal.startswith("batch/input") and row.signal.endswith("/histogram"):
                leaf = row.signal.removeprefix("batch/").removesuffix("/histogram")
                self._add(leaf, np.sqrt(row.values), _root_mean_square, arrival)

    def _add(self, leaf: str, values: npt.ArrayLike, reduction: "_Reduction", arrival: Arrival) -> None:
        drift = self._drifts.setdefault(leaf, _Drift(reduction))
        drift.add(np.asarray(values, dtype=np.float64), weight=_batch_weight(arrival))


_Reduction = Callable[[npt.NDArray[np.float64]], float]
"""Reduces the distances of several statistics to one, which is about 1 for stationary data."""


def _maximum(distances: npt.NDArray[np.float64]) -> float:
    return float(np.abs(distances).max())


def _root_mean_square(distances: npt.NDArray[np.float64]) -> float:
    """Root mean square over the tokens that occur; the maximum of 64 would be large without any drift."""
    moving = distances[distances != 0.0]
    return float(np.sqrt(np.mean(np.square(moving)))) if moving.size else 0.0


class _Drift:
    """Distance of an input's statistics from the reference batches, as a moving average."""

    ERROR: Final = math.sqrt(SMOOTHING / (2 - SMOOTHING) + 1 / REFERENCE_BATCHES)
    """Standard error of moving average minus reference mean, in standard deviations between batches."""

    def __init__(self, reduction: _Reduction) -> None:
        self._reduction = reduction
        self._count = 0
        self._mean = self._squares = self._moving = np.zeros(1)

    def add(self, values: npt.NDArray[np.float64], weight: float) -> None:
        if self._count < REFERENCE_BATCHES:  # Welford
            self._count += 1
            step = values - self._mean
            self._mean = self._mean + step / self._count
            self._squares = self._squares + step * (values - self._mean)
            return
        spread = np.sqrt(self._squares / (self._count - 1))
        least = np.maximum(1e-6 * np.abs(self._mean), 1e-12)
        deviation = (values - self._mean) / np.maximum(spread, least) * weight
        self._moving = self._moving + SMOOTHING * (np.clip(deviation, -MAX_DEVIATION, MAX_DEVIATION) - self._moving)

    def distance(self) -> float | None:
        """The distance in standard errors; `None` until the reference is complete."""
        return None if self._count < REFERENCE_BATCHES else self._reduction(self._moving) / self.ERROR


def _batch_weight(arrival: Arrival) -> float:
    """Weight of a batch's deviation: sqrt(size / usual size), since a short batch is noisier."""
    size, usual = arrival.row.batch_size, arrival.row.usual_batch_size
    return 1.0 if not size or not usual else math.sqrt(size / usual)
