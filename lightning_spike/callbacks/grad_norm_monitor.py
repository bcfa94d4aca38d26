"""`GradNormMonitor`: gradient norms as the backward pass made them, and what clipping did to them."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.detectors.layer_falls import Fall, GradientFalls
from lightning_spike.record.mixed_precision import left_scale
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding, RunStatus
from lightning_spike.signals.gradients import gradient_norms
from lightning_spike.signals.learning_rate import optimizer_names

NAMED: Final = 8


class GradNormMonitor(SpikeCallback):
    """Records the gradient norm of every step, in all and for every parameter, before clipping, and whether clipping acted.

    The norms are read in `on_before_optimizer_step`: gradients are complete over the accumulation, averaged over the
    ranks, unscaled, and not yet clipped. One fused pass over the gradients, no blocking read. What it sees is evidence
    for the ranking (explosion, vanishing, which layer first) and is written to `signals/`.

    Finding: detector `"gradients"`, kind `"vanished"`, once for each optimizer: the gradients of some parameters have
        fallen to a fraction of what they were, far more than those of others,
    with a loss no lower than before; judged by medians of 16 rows, after two in a row. `names` (the first eight, the
    worst first), `count`, `of`, `before` and `now` (norms of the worst) and `text`.

    Args:
        per_layer_every: Record the norm of every single parameter at each so-manieth optimizer step, 1 for each step;
            the total is recorded at every step in any case. Larger values save memory on models with very many
            parameters.

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
        names = {id(p): name.replace("_orig_mod.", "") for name, p in module.named_parameters()}
        self._optimizer_names = dict(zip(map(id, trainer.optimizers), optimizer_names(trainer.optimizers), strict=True))
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
        unscale = left_scale(batch.trainer, optimizer)
        self._totals[id(optimizer)] = norms.total / unscale
        if len(self._parameters) > 1:
            self.flight.recorder.put(f"grad_norm/{self._optimizer_names[id(optimizer)]}", norms.total / unscale)
        if batch.at.step % self.per_layer_every == 0:
            self.flight.recorder.put_vector(self._layer_signal(optimizer), norms.per_parameter / unscale)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        if (
            not self._totals
        ):  # no update in this batch: accumulation goes on, or the optimizer is stepped behind Lightning's back
            return
        total = _joined(list(self._totals.values()))
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
                f"In {len(store.history)} batches there was no optimizer step that Lightning could announce, so gradients and learning rates were "
                "not seen. Step the optimizers that self.optimizers() returns, not the raw ones (use_pl_optimizer=False)."
            )

    def _after_clip(self, total: Tensor) -> Tensor | None:
        """Worked out where Lightning clips by norm, measured where it is not known what was done; `None` without clipping."""
        facts = self.flight.store.facts
        if self._measures_after_clip:
            parameters = [p for key in self._totals for p in self._parameters[key]]
            return gradient_norms(parameters).total
        return None if facts.gradient_clip_val is None else total.clamp(max=facts.gradient_clip_val)

    def _layer_signal(self, optimizer: Optimizer) -> str:
        return "grad_norm" if len(self._parameters) <= 1 else f"grad_norm/{self._optimizer_names[id(optimizer)]}"


def _vanished(fall: Fall, names: tuple[str, ...]) -> dict[str, Any]:
    worst = fall.places[0]
    before, now = float(fall.before[worst]), float(fall.now[worst])
    some = f"The gradients of {len(fall.places)} of {len(names)} parameters have all but vanished"
    return {
        "names": [names[k] for k in fall.places[:NAMED]],
        "count": len(fall.places),
        "of": len(names),
        "before": before,
        "now": now,
        "text": f"{some}, most that of {names[worst]}: its norm is {now:.3g} and was {before:.3g}, while the loss is no lower.",
    }


def _joined(totals: Sequence[Tensor]) -> Tensor:
    return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(list(totals)))
