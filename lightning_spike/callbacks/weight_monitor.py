"""`WeightMonitor`: how large the weights are, how far updates move them, and whether they began at a sensible scale."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.update_meter import UpdateMeter
from lightning_spike.records import Finding
from lightning_spike.signals.subset import is_readable
from lightning_spike.signals.weights import fan_scale, initial_scales, weight_sizes

TOO_LARGE: Final = 4.0
"""Initial scale over 1 / sqrt(fan-in) above which it is no usual initialisation any more: the largest that
`torch.nn.init` gives is 2.4 (He with the gain of tanh)."""
FAR_TOO_LARGE: Final = 8.0
"""The same for a single weight among sound ones."""
TOO_SMALL: Final = 0.02
"""The same below: a residual branch scaled down for a dozen layers (GPT-2) has 0.03; weights of exactly 0 are meant."""
MOST: Final = 0.5
"""Share of the weights that must be off."""
FEWEST: Final = 32
"""Elements from which on a scale is one: that of fewer is chance."""
NAMED: Final = 8

SCALES: Final = "initial_scale"


class WeightMonitor(SpikeCallback):
    """Records sizes of weights and of updates every few batches.

    `weight_norm` (L2 norm of all parameters) and, for every parameter, the vectors `weight_norm` and `weight_max`
    (largest absolute value), in one pass each; `update_norm` (L2 norm of the last change of all parameters) and the
    vector of the same for every parameter, -1 for one that the update did not concern: before the optimizer's step a
    copy is taken of up to 16,384 elements of each parameter, so the norm of a larger one is an estimate. Parameters
    that are sharded over ranks are passed over.

    At the start of a run that is not resumed the vector `initial_scale`: the root mean square of each weight of a layer
    of torch, over 1 / sqrt(fan-in). Where that is extreme, a finding: detector `"weights"`, kind `"initial_scale"`,
    with `names` (the first eight), `count`, `of`, `scale` (the most extreme), `direction` (`"large"` or `"small"`) and
    `text`.

    Args:
        every: Batches between two looks at the weights, and updates between two looks at an update; 1 for each.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = whole_number("WeightMonitor(every)", every, at_least=1, do="Use 1 for every batch.")
        self._weights: list[Tensor] = []
        self._initial: list[tuple[str, Tensor, float]] = []
        self._sums: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        """Which of the weights with an initial scale sum over inputs; embeddings may be as small as they like."""

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.flight.share(UpdateMeter, UpdateMeter, trainer, module).measure_every(self.every)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        named = [(n.replace("_orig_mod.", ""), p) for n, p in module.named_parameters() if is_readable(p)]
        store = self.flight.store
        self._weights = [p for _, p in named]
        store.layer_names["weight_norm"] = store.layer_names["weight_max"] = tuple(n for n, _ in named)
        is_new = store.facts.resumed_from is None and store.facts.first_step == 0
        self._initial = list(_scaled(module)) if is_new else []
        store.layer_names[SCALES] = tuple(name for name, _, _ in self._initial)
        self._sums = np.array([scale < 1.0 for _, _, scale in self._initial])
        if len(named) < sum(1 for _ in module.parameters()):
            store.note(
                "WeightMonitor passes over parameters that have no plain values on this rank (sharded, quantised or empty ones)."
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
    """Name, weight and the scale that its fan-in asks for, of the trainable weights of torch's own layers."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            scale = fan_scale(part, name, weight) if is_readable(weight) else None
            if scale is not None and weight.requires_grad and weight.numel() >= FEWEST and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{path}.{name}".replace("_orig_mod.", "").lstrip("."), weight, scale


def _judged(
    scales: npt.NDArray[np.float32], sums: npt.NDArray[np.bool_], names: tuple[str, ...]
) -> dict[str, Any] | None:
    """What is wrong with the initial scales, `None` where nothing is."""
    for direction, off in (("large", scales > TOO_LARGE), ("small", sums & (scales > 0) & (scales < TOO_SMALL))):
        if off.mean() >= MOST or (direction == "large" and scales.max() > FAR_TOO_LARGE):
            worst = int(scales.argmax()) if direction == "large" else int(np.where(off, scales, np.inf).argmin())
            scale = float(scales[worst])
            said = f"{scale:.3g} times 1 / sqrt(fan-in)"
            return {
                "names": [names[k] for k in np.flatnonzero(off)[:NAMED]],
                "count": int(off.sum()),
                "of": len(names),
                "scale": scale if np.isfinite(scale) else None,
                "direction": direction,
                "text": f"{int(off.sum())} of {len(names)} weights are too {direction} from the start, the most {names[worst]}: {said}; usual are 0.1 to 2.4.",
            }
    return None
