"""`PrecisionMonitor`: loss scale, skipped updates, and gradients too small for half precision."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.detectors.loss_scale import LossScaleDetector
from lightning_spike.record.mixed_precision import low_precision, remaining_scale, scaler_of
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.signals.precision import loss_scale, underflow


class PrecisionMonitor(SpikeCallback):
    """Records loss scale and gradient underflow in half precision; in float32 it does nothing.

    - With a gradient scaler (`16-mixed`), at every update: `loss_scale`, the factor on the batch's loss, and
      `skipped_step`, 1 if the scaler skipped the update because of a non-finite gradient, else 0.
    - In any half precision, every few updates: `grad_zeros`, share of the gradients' entries that are exactly 0, and
      `grad_underflow`, share of the others that lose digits. Those are, when scaled, below the smallest normal number
      of the precision (6.1e-5 for float16). Large gradients are measured on 16,384 entries.

    Findings are those of `LossScaleDetector`: detector `"precision"`, kinds `"scale_leapt"`, `"often_skipped"`,
    `"scale_too_low"`.

    About one skipped update in 2,000 is normal for float16: that is how the scaler finds its scale. The scale is read
    as a device tensor, so nothing waits for the device.

    Args:
        every: Measure the gradients every N updates; 1 for each.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = whole_number("PrecisionMonitor(every)", every, at_least=1, do="Use 1 for every update.")
        self._reset()

    def _reset(self) -> None:
        self._detector = LossScaleDetector()
        self._low: torch.dtype | None = None
        self._scaler: GradScaler | None = None
        self._used: Tensor | None = None
        """The loss scale of the current batch."""
        self._updates: dict[int, int] = {}

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        self._low = low_precision(trainer)
        self._scaler = scaler_of(trainer)

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._used = None

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        if self._low is None:
            return
        if self._scaler is not None and self._used is None:
            self._used = loss_scale(self._scaler)
        count = self._updates[id(optimizer)] = self._updates.get(id(optimizer), -1) + 1
        if count % self.every == 0:
            self._look_at(batch.trainer, optimizer, self._low)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        if self._used is None or self._scaler is None or (now := loss_scale(self._scaler)) is None:
            return
        self.flight.recorder.put("loss_scale", self._used)
        self.flight.recorder.put("skipped_step", (now < self._used).float())

    @override
    def judge(self, arrival: Arrival) -> None:
        self.flight.store.note(*self._detector.observe(arrival.row))

    @override
    def release(self) -> None:
        self._reset()

    def _look_at(self, trainer: Trainer, optimizer: Optimizer, low: torch.dtype) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        unscaled_by = 1.0 if self._used is None else self._used / remaining_scale(trainer, optimizer)
        shares = underflow(gradients, torch.finfo(low).tiny / unscaled_by)
        if shares is not None:
            self.flight.recorder.put("grad_zeros", shares[0])
            self.flight.recorder.put("grad_underflow", shares[1])
