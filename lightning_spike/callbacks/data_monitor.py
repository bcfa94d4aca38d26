"""`DataMonitor`: what is in the batches: how large values are, how classes and sample weights are spread, and whether the inputs move."""

import dataclasses
import math
from typing import Final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.actions.batch_statistics import BatchStatistics
from lightning_spike.arguments import batch_path
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.flight.participant import TrainingBatch
from lightning_spike.recorder import Arrival
from lightning_spike.signals.batch import BatchRoles

__all__ = ["DataMonitor"]

REFERENCE: Final = 64
"""Batches at the beginning of the run (or of its resumed part) that later ones are compared with."""
SHARE: Final = 1 / 16
"""Of the newest batch in the moving average: it looks back over some thirty batches."""
MOST: Final = 5.0
"""Spreads at which a single batch's deviation is cut off: one bad batch is no drift."""


class DataMonitor(SpikeCallback):
    """Records statistics of every batch; what they show is evidence for the ranking, and is written to `signals/`.

    For every floating tensor `batch/<leaf>/mean`, `std`, `max_abs`, `nonfinite`, `zeros`; for an integer target `distinct`, `entropy`, `largest`, `longest_run` and the vector `histogram`
    (classes modulo 64); for sample weights also `ess` and `max_share`; see `signals.batch`. For inputs also `batch/<leaf>/drift`: how far the moving average of mean
    and log spread over the last thirty or so batches, those before this one, lies from the run's first 64, in standard errors: around 1 where the data stay as they are.

    All batches are measured, since the one that matters is not known beforehand. A few kernels for each tensor, nothing blocks. `BadBatchDumper` measures the same where it
    is alone; where both say which part of a batch is what, the later in the list of callbacks wins.

    Args:
        input: Path of the input in a batch where the convention does not fit: keys and positions joined by dots, as `"image"` or `"0.x"`. What is then neither input nor
            target nor weight is passed over. By convention all that is neither target nor weight.
        target: Path of the target. By convention the last tensor of a tuple or list, or what is called label(s), target(s) or y.
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
                    drift = self._drifts.setdefault(leaf, _Drift())
                    drift.add((mean, math.log(max(spread, 1e-30))), weight=_size(arrival))


@dataclasses.dataclass(slots=True)
class _Course:
    """One number over the batches: its mean and spread over the reference, and its moving average since."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    moving: float = 0.0
    """Of the deviations from `mean`, in spreads."""

    def add(self, value: float, weight: float) -> None:
        if self.count < REFERENCE:  # Welford
            self.count += 1
            step = value - self.mean
            self.mean += step / self.count
            self.squares += step * (value - self.mean)
            return
        spread = math.sqrt(self.squares / (self.count - 1))
        away = (value - self.mean) / max(spread, 1e-6 * abs(self.mean), 1e-12) * weight
        self.moving += SHARE * (max(-MOST, min(MOST, away)) - self.moving)


class _Drift:
    """How far an input's statistics have moved from where they began."""

    ERROR: Final = math.sqrt(SHARE / (2 - SHARE) + 1 / REFERENCE)
    """Standard error of the moving average less the reference's mean, in spreads between single batches."""

    def __init__(self) -> None:
        self._courses: tuple[_Course, ...] = ()

    def add(self, values: tuple[float, ...], weight: float) -> None:
        self._courses = self._courses or tuple(_Course() for _ in values)
        for course, value in zip(self._courses, values, strict=True):
            course.add(value, weight)

    def distance(self) -> float | None:
        """In standard errors, the largest over the statistics; `None` while the reference is being made."""
        if not self._courses or self._courses[0].count < REFERENCE:
            return None
        return max(abs(course.moving) for course in self._courses) / self.ERROR


def _size(arrival: Arrival) -> float:
    """A short batch deviates by more: its deviation counts for less by the root of its share."""
    size, usual = arrival.row.batch_size, arrival.row.usual_batch_size
    return 1.0 if not size or not usual else math.sqrt(size / usual)
