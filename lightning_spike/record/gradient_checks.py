"""Checks of every training step: each trainable parameter has an optimizer and a gradient, which is zeroed again."""

import math
from collections.abc import Sequence
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
"""L2 norm of the gradients that an update left, when the next backward pass begins; recorded where there are any."""
PATIENCE: Final = 20
"""Updates in a row without a gradient before it is reported; a randomly dropped layer has one earlier;
engineering choice."""
CHECK_EVERY: Final = 10
"""Batches between two checks of gradients that are zeroed, not removed (`set_to_none=False`); engineering choice."""
MAX_NAMES: Final = 8
"""Parameters named in a finding; engineering choice."""


class GradientChecks(Participant):
    """Finds parameters without optimizer or gradient, and gradients that are not zeroed. No device read.

    Findings of the detector `"optimizer"`, all with `names` (the first eight), `count` and `text`:

    - `"not_optimized"`: trainable parameters with gradients that are in no optimizer; `from_start` says whether they
      never were, which can be intended.
    - `"no_gradient"`: trainable parameters of an optimizer without a gradient in 20 of its updates in a row;
      `from_start` as above.
    - `"not_zeroed"`: gradients of an update are still there, and not 0, when the next backward pass begins; `norm`.
      Under automatic optimisation only.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._named: list[tuple[str, Tensor]] = []
        self._never: set[int] = set()
        """Ids of the parameters that never had a gradient."""
        self._optimized: set[int] = set()
        self._counts: list[int] = []
        self._waits: dict[int, int] = {}
        self._checked_rest = False
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
            self._report(batch.at, "not_optimized", lost, "left the optimizer and are not updated", from_start=False)

    @override
    def sense_backward(self, batch: TrainingBatch, loss: Tensor) -> None:
        begins = batch.at.batch_idx % batch.trainer.accumulate_grad_batches == 0
        if not (batch.module.automatic_optimization and begins and self._stepped):
            return
        self._stepped = False
        left = [p.grad for o in batch.trainer.optimizers for p in _parameters(o) if p.grad is not None]
        readable = [gradient for gradient in left if is_readable(gradient)]
        had_some, self._had_leftovers = self._had_leftovers, bool(readable)
        if readable and (not had_some or batch.at.ordinal % CHECK_EVERY == 0):
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
        self._waits = {key: wait for key, wait in self._waits.items() if key not in there} | waits
        due = {key for key, wait in waits.items() if wait == PATIENCE}
        for from_start in (False, True):
            names = [n for n, p in self._named if id(p) in due and (id(p) in self._never) is from_start]
            if names:
                since = "since the start" if from_start else f"in the last {PATIENCE} updates"
                self._report(batch.at, "no_gradient", names, f"had no gradient {since}", from_start=from_start)
        if not self._checked_rest:
            self._check_rest(batch.at)

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
        text = (
            f"The gradients of the last update (norm {size}) were not zeroed before the next backward pass: "
            "gradients of several updates add up."
        )
        detail = {"norm": norm if math.isfinite(norm) else None, "text": text}
        self.flight.store.note(Finding(detector="optimizer", kind="not_zeroed", at=arrival.row.at, detail=detail))

    @override
    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._reset()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note an optimizer step; the lab's steps, outside of a batch, do not count."""
        del optimizer, args, kwargs
        self._stepped = self._stepped or self._in_batch

    def _check_rest(self, at: Moment) -> None:
        """Report parameters with a gradient and no optimizer, once, at the first gradients."""
        self._checked_rest = True
        rest = [n for n, p in self._named if p.requires_grad and p.grad is not None and id(p) not in self._optimized]
        if rest:
            self._report(at, "not_optimized", rest, "have gradients but no optimizer", from_start=True)

    def _report(self, at: Moment, kind: str, names: Sequence[str], what: str, *, from_start: bool) -> None:
        some = ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
        detail = {
            "names": list(names[:MAX_NAMES]),
            "count": len(names),
            "of": len(self._named),
            "from_start": from_start,
            "text": f"{len(names)} of {len(self._named)} parameters {what}: {some}.",
        }
        self.flight.store.note(Finding(detector="optimizer", kind=kind, at=at, detail=detail))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
