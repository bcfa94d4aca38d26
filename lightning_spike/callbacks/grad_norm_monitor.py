"""`GradNormMonitor`: gradient norms as the backward pass made them, and what clipping did to them."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback, counted, names_by_optimizer, plain_name
from lightning_spike.detectors.layer_falls import Fall, GradientFalls
from lightning_spike.record.mixed_precision import remaining_scale
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding, RunStatus
from lightning_spike.signals.gradients import gradient_norms


class GradNormMonitor(SpikeCallback):
    """Records gradient norms before clipping, in total and per parameter, and the norm after clipping.

    The norms are read in `on_before_optimizer_step`: gradients are accumulated, averaged over the ranks, unscaled, and
    not yet clipped. It takes one fused pass over the gradients and no blocking read. The norms are evidence for the
    ranking (explosion, vanishing, the layer that began) and are written to `signals/`.

    Finding: detector `"gradients"`, kind `"vanished"`, once per optimizer: some parameters' gradients fell to a
    fraction of their earlier norm, far more than others', while the loss is no lower. Medians of 16 rows are compared,
    twice in a row. `names` (the first eight, worst first), `count`, `of`, `before`, `now` (norms of the worst), `text`.

    Args:
        per_layer_every: Record the norm of every parameter every N optimizer steps, 1 for each step. The total is
            recorded at every step. Larger values save memory on models with very many parameters.

    Raises:
        ConfigurationError: `per_layer_every` is not a whole number of at least 1.
    """

    def __init__(self, per_layer_every: int = 1) -> None:
        self.per_layer_every = whole_number(
            "GradNormMonitor(per_layer_every)", per_layer_every, at_least=1, do="Use 1 for every step."
        )
        self._totals: dict[int, Tensor] = {}
        self._parameters: dict[int, list[nn.Parameter]] = {}
        self._optimizer_names: dict[int, str] = {}
        self._measures_after_clip = False
        self._falls: dict[str, GradientFalls] = {}

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._falls = {}
        names = {id(p): plain_name(name) for name, p in module.named_parameters()}
        self._optimizer_names = names_by_optimizer(trainer)
        self._parameters = {id(o): [p for g in o.param_groups for p in g["params"]] for o in trainer.optimizers}
        for optimizer in trainer.optimizers:
            of_optimizer = tuple(names.get(id(p), "?") for p in self._parameters[id(optimizer)])
            self.flight.store.layer_names[self._layer_signal(optimizer)] = of_optimizer
        facts = self.flight.store.facts
        self._measures_after_clip = facts.clips_by_hand or facts.gradient_clip_algorithm == "value"

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._totals = {}

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        norms = gradient_norms(self._parameters[id(optimizer)])
        unscale = remaining_scale(batch.trainer, optimizer)
        self._totals[id(optimizer)] = norms.total / unscale
        if len(self._parameters) > 1:
            self.flight.recorder.put(f"grad_norm/{self._optimizer_names[id(optimizer)]}", norms.total / unscale)
        if batch.at.step % self.per_layer_every == 0:
            self.flight.recorder.put_vector(self._layer_signal(optimizer), norms.per_parameter / unscale)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        if not self._totals:  # no update in this batch, or one that Lightning does not see
            return
        totals = list(self._totals.values())
        total = totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))
        self.flight.recorder.put("grad_norm", total)
        after = self._after_clip(total)
        if after is not None:
            self.flight.recorder.put("grad_norm/after_clip", after)

    @override
    def judge(self, arrival: Arrival) -> None:
        loss = arrival.row.values.get("loss", math.nan)
        for row in arrival.layers:
            if row.signal.split("/")[0] != "grad_norm" or not math.isfinite(loss):
                continue
            fall = self._falls.setdefault(row.signal, GradientFalls()).push(np.asarray(row.values, np.float64), loss)
            if fall is not None:
                detail = _vanished(fall, self.flight.store.layer_names[row.signal])
                self.flight.store.note(Finding(detector="gradients", kind="vanished", at=row.at, detail=detail))

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        store = self.flight.store
        if len(store.history) > store.facts.accumulate_grad_batches and "grad_norm" not in store.history.signals:
            store.note(
                f"In {len(store.history)} batches there was no optimizer step that Lightning could announce, so "
                "gradients and learning rates were not seen. Step the optimizers that self.optimizers() returns, not "
                "the raw ones (use_pl_optimizer=False)."
            )

    def _after_clip(self, total: Tensor) -> Tensor | None:
        """The norm after clipping: calculated if Lightning clips by norm, else measured; `None` without clipping."""
        if self._measures_after_clip:
            return gradient_norms([p for key in self._totals for p in self._parameters[key]]).total
        limit = self.flight.store.facts.gradient_clip_val
        return None if limit is None else total.clamp(max=limit)

    def _layer_signal(self, optimizer: Optimizer) -> str:
        return "grad_norm" if len(self._parameters) <= 1 else f"grad_norm/{self._optimizer_names[id(optimizer)]}"


def _vanished(fall: Fall, names: tuple[str, ...]) -> dict[str, Any]:
    worst = fall.places[0]
    before, now = float(fall.before[worst]), float(fall.now[worst])
    text = (
        f"The gradients of {len(fall.places)} of {len(names)} parameters have all but vanished, most that of "
        f"{names[worst]}: its norm is {now:.3g} and was {before:.3g}, while the loss is no lower."
    )
    return counted([names[k] for k in fall.places], len(names), text) | {"before": before, "now": now}
