"""What must hold in every sound training step.

Each trainable parameter is in an optimizer, gets a gradient, and loses it again before the next backward pass.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding, Moment
from lightning_spike.signals.gradients import tensor_norms
from lightning_spike.signals.subset import is_readable

LEFTOVER: Final = "grad_norm/leftover"
"""L2 norm of what an update left of its gradients when the next backward pass begins; recorded only where gradients are
still there at all."""
PATIENCE: Final = 20
"""Updates in a row without a gradient after which a parameter is said to get none: a layer that is dropped at random
has one before."""
LOOK_EVERY: Final = 10
"""Batches between two looks at gradients that are zeroed rather than removed (`set_to_none=False`)."""
NAMED: Final = 8
"""Parameters named in a finding."""


class GradientChecks(Participant):
    """Finds parameters that no optimizer has, that get no gradient, and gradients that are not zeroed. No device read.

    Findings, all with `names` (the first eight), `count` and `text`:

    - detector `"optimizer"`, kind `"not_optimized"`: trainable parameters that get gradients and are in no optimizer;
      `from_start` tells whether they ever were in one: if not, it may be meant.
    - kind `"no_gradient"`: trainable parameters of an optimizer that had no gradient in 20 of its updates in a row;
      `from_start` as above.
    - kind `"not_zeroed"`: an update's gradients are still there, and not 0, when the next backward pass begins; `norm`.
      Under automatic optimisation only: by hand it may be meant.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._named: list[tuple[str, Tensor]] = []
        self._never: set[int] = set()
        """Parameters that never had a gradient."""
        self._optimized: set[int] = set()
        self._counts: list[int] = []
        self._waits: dict[int, int] = {}
        self._looked_at_rest = False
        self._in_batch = False
        self._stepped = False
        self._had_leftovers = False
        self._not_zeroed = False

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        self._named = [(n.replace("_orig_mod.", ""), p) for n, p in module.named_parameters()]
        self._never = {id(p) for _, p in self._named}
        self._handles = [o.register_step_post_hook(self._on_step) for o in trainer.optimizers]

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._in_batch = True
        groups = [g["params"] for o in batch.trainer.optimizers for g in o.param_groups]
        counts = [len(group) for group in groups]
        if counts == self._counts:
            return
        self._counts = counts
        optimized = {id(p) for group in groups for p in group}
        lost = [n for n, p in self._named if p.requires_grad and id(p) in self._optimized and id(p) not in optimized]
        self._optimized = optimized
        if lost:
            self._find(
                batch.at, "not_optimized", lost, "left the optimizer and get no update any more", from_start=False
            )

    @override
    def sense_backward(self, batch: TrainingBatch, loss: Tensor) -> None:
        begins = batch.at.batch_idx % batch.trainer.accumulate_grad_batches == 0
        if not (batch.module.automatic_optimization and begins and self._stepped):
            return
        self._stepped = False
        left = [p.grad for o in batch.trainer.optimizers for p in _parameters(o) if p.grad is not None]
        readable = [gradient for gradient in left if is_readable(gradient)]
        had_some, self._had_leftovers = self._had_leftovers, bool(readable)
        if readable and (not had_some or batch.at.ordinal % LOOK_EVERY == 0):
            total = torch.linalg.vector_norm(torch.stack(tensor_norms([g.detach() for g in readable])))
            self.flight.recorder.put(LEFTOVER, total)
        if not readable:
            self._not_zeroed = False

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        parameters = _parameters(optimizer)
        there = {id(p) for p in parameters if p.grad is not None}
        if not there:  # nothing was computed: a step that was skipped on purpose
            return
        self._never -= there
        lacking = {id(p) for p in parameters if p.requires_grad} - there
        waits = {key: self._waits.get(key, 0) + 1 for key in lacking}
        for key in there:
            self._waits.pop(key, None)
        self._waits |= waits
        due = {key for key, wait in waits.items() if wait == PATIENCE}
        for from_start in (False, True):
            names = [n for n, p in self._named if id(p) in due and (id(p) in self._never) is from_start]
            if names:
                since = "since the start" if from_start else f"in the last {PATIENCE} updates"
                self._find(batch.at, "no_gradient", names, f"had no gradient {since}", from_start=from_start)
        if not self._looked_at_rest:
            self._look_at_rest(batch.at)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self._in_batch = False

    @override
    def judge(self, arrival: Arrival) -> None:
        norm = arrival.row.values.get(LEFTOVER)
        if norm is None or norm == 0.0 or self._not_zeroed:
            return
        self._not_zeroed = True
        size = f"{norm:.3g}" if math.isfinite(norm) else "not finite"
        text = f"Gradients of the last update were still there (norm {size}) when the next backward pass began: they were not zeroed, so that batches pile up."
        detail = {"norm": norm if math.isfinite(norm) else None, "text": text}
        self.flight.store.note(Finding(detector="optimizer", kind="not_zeroed", at=arrival.row.at, detail=detail))

    @override
    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._reset()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch when an optimizer has stepped; the lab's steps, outside of a batch, do not count."""
        del optimizer, args, kwargs
        self._stepped = self._stepped or self._in_batch

    def _look_at_rest(self, at: Moment) -> None:
        """Once, when the first gradients are there: parameters that get one and that nobody updates.

        One without is a teacher's or a metric's.
        """
        self._looked_at_rest = True
        rest = [n for n, p in self._named if p.requires_grad and p.grad is not None and id(p) not in self._optimized]
        if rest:
            self._find(at, "not_optimized", rest, "get gradients and are in no optimizer", from_start=True)

    def _find(self, at: Moment, kind: str, names: Sequence[str], what: str, *, from_start: bool) -> None:
        some = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        detail = {
            "names": list(names[:NAMED]),
            "count": len(names),
            "of": len(self._named),
            "from_start": from_start,
            "text": f"{len(names)} of {len(self._named)} parameters {what}: {some}.",
        }
        self.flight.store.note(Finding(detector="optimizer", kind=kind, at=at, detail=detail))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    groups: Iterable[Any] = optimizer.param_groups
    return [p for group in groups for p in group["params"]]
