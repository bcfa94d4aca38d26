"""`WeightMonitor`: how large the weights are, how far updates move them, and whether they began at a sensible scale."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback, counted, plain_name
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.update_meter import UpdateMeter
from lightning_spike.records import Finding
from lightning_spike.signals.subset import is_readable
from lightning_spike.signals.weights import fan_scale, initial_scales, weight_sizes

MAX_INITIAL_SCALE: Final = 4.0
"""Initial scale over 1 / sqrt(fan-in) above which an initialisation is unusual; engineering choice. The largest of
`torch.nn.init` is 2.4 (He with the gain of tanh)."""
MAX_SINGLE_SCALE: Final = 8.0
"""The same for a single weight among normal ones; engineering choice."""
MIN_INITIAL_SCALE: Final = 0.02
"""The lower limit; engineering choice. A residual branch scaled down for a dozen layers (GPT-2) has 0.03; weights of
exactly 0 are intended."""
MIN_UNUSUAL_SHARE: Final = 0.5
"""Share of the weights that must be outside these limits; engineering choice."""
MIN_ELEMENTS: Final = 32
"""Weights with fewer elements have no reliable scale; engineering choice."""
SCALES: Final = "initial_scale"


class WeightMonitor(SpikeCallback):
    """Records sizes of weights and of updates every few batches.

    - `weight_norm`: L2 norm of all parameters; the vectors `weight_norm` and `weight_max` (largest absolute value) have
      an entry per parameter;
    - `update_norm`: L2 norm of the last change of all parameters; the vector has an entry per parameter, -1 for one
      that was not updated. The norm of a parameter with more than 16,384 elements is estimated from so many.
    - `initial_scale`, a vector, at the start of a run that is not resumed: root mean square of each weight of torch's
      layers, over 1 / sqrt(fan-in).

    Parameters that are sharded over ranks are skipped.

    Finding: detector `"weights"`, kind `"initial_scale"`, if that scale is extreme; `names` (the first eight), `count`,
    `of`, `scale` (the most extreme), `direction` (`"large"` or `"small"`), `text`.

    Args:
        every: Measure weights every N batches and updates every N updates; 1 for each.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = whole_number("WeightMonitor(every)", every, at_least=1, do="Use 1 for every batch.")
        self._weights: list[Tensor] = []
        self._initial: list[tuple[str, Tensor, float]] = []
        self._sums: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        """Which weights with an initial scale sum over inputs; embeddings do not and have no lower limit."""

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.flight.share(UpdateMeter, UpdateMeter, trainer, module).measure_every(self.every)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        named = [(plain_name(n), p) for n, p in module.named_parameters() if is_readable(p)]
        store = self.flight.store
        self._weights = [p for _, p in named]
        store.layer_names["weight_norm"] = store.layer_names["weight_max"] = tuple(n for n, _ in named)
        is_new = store.facts.resumed_from is None and store.facts.first_step == 0
        self._initial = list(_scaled(module)) if is_new else []
        store.layer_names[SCALES] = tuple(name for name, _, _ in self._initial)
        self._sums = np.array([scale < 1.0 for _, _, scale in self._initial])
        if len(named) < sum(1 for _ in module.parameters()):
            store.note(
                "WeightMonitor skips parameters that have no plain values on this rank (sharded, quantised or empty)."
            )

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        if not self._initial:
            return
        _, weights, scales = zip(*self._initial, strict=True)
        self.flight.recorder.put_vector(SCALES, initial_scales(weights, scales))
        self._initial = []

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        if batch.at.ordinal % self.every or not self._weights:
            return
        sizes = weight_sizes(self._weights)
        self.flight.recorder.put("weight_norm", sizes.total)
        self.flight.recorder.put_vector("weight_norm", sizes.norms)
        self.flight.recorder.put_vector("weight_max", sizes.largest)

    @override
    def judge(self, arrival: Arrival) -> None:
        for row in arrival.layers:
            if row.signal == SCALES and (
                detail := _judged(row.values, self._sums, self.flight.store.layer_names[SCALES])
            ):
                self.flight.store.note(Finding(detector="weights", kind=SCALES, at=row.at, detail=detail))

    @override
    def release(self) -> None:
        self._weights, self._initial = [], []


def _scaled(module: LightningModule) -> Iterator[tuple[str, Tensor, float]]:
    """Name, weight and fan-in scale of each trainable weight of torch's own layers."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            scale = fan_scale(part, name, weight) if is_readable(weight) else None
            if scale is not None and weight.requires_grad and weight.numel() >= MIN_ELEMENTS and id(weight) not in seen:
                seen.add(id(weight))
                yield plain_name(f"{path}.{name}").lstrip("."), weight, scale


def _judged(
    scales: npt.NDArray[np.float32], sums: npt.NDArray[np.bool_], names: tuple[str, ...]
) -> dict[str, Any] | None:
    """The finding's detail if the initial scales are too large or too small, else `None`."""
    too_small = sums & (scales > 0) & (scales < MIN_INITIAL_SCALE)
    for direction, off in (("large", scales > MAX_INITIAL_SCALE), ("small", too_small)):
        if off.mean() >= MIN_UNUSUAL_SHARE or (direction == "large" and scales.max() > MAX_SINGLE_SCALE):
            worst = int(scales.argmax()) if direction == "large" else int(np.where(off, scales, np.inf).argmin())
            scale = float(scales[worst])
            text = (
                f"{int(off.sum())} of {len(names)} weights are too {direction} from the start, the most "
                f"{names[worst]}: {scale:.3g} times 1 / sqrt(fan-in); usual are 0.1 to 2.4."
            )
            detail = counted([names[k] for k in np.flatnonzero(off)], len(names), text)
            return detail | {"scale": scale if np.isfinite(scale) else None, "direction": direction}
    return None
