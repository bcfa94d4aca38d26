"""`RankSyncMonitor`: finds DDP ranks whose weights, gradients or counters differ."""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback, first_names, plain_name
from lightning_spike.ranks.control_group import ControlGroup, Exchange, why_no_control_group
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding, Moment
from lightning_spike.signals.ranks import checksums

WEIGHTS: Final = "ranks/weights"
GRADIENTS: Final = "ranks/gradients"
COUNTERS: Final = ("ordinal", "step", "learning_rate")
"""Values that must be equal on all ranks, beside weights and gradients."""
HEAD: Final = ("loss", *COUNTERS)
OUTLIER_RATIO: Final = 10.0
"""Loss over the median of the other ranks' losses from which a rank is an outlier."""
MIN_OUTLIER_CHECKS: Final = 3
"""Checks in a row with the same outlier before a finding about a finite loss: single batches differ."""
MAX_PENDING: Final = 8
"""Exchanges that may be pending at once; further checks are left out until one has arrived."""

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(slots=True)
class _Exchange:
    """One check, on its way to the other ranks."""

    at: Moment
    rows: Exchange


class RankSyncMonitor(SpikeCallback):
    """Compares the ranks of a DDP training every few batches, to the bit; with one process it does nothing.

    Every rank takes a checksum of each gradient (after DDP's averaging, before clipping) and, after the update, of each
    parameter: the vectors `ranks/gradients` and `ranks/weights`, whole numbers below 2^24, -1 for a parameter without.
    On the host they are exchanged over a process group of their own (gloo, on the CPU). No rank waits: an exchange with
    a rank that has ended or failed stays open. Only creating the group waits, when training starts.

    Findings, on every rank alike, detector `"ranks"`:

    - `"weights_differ"` and `"gradient_differs"`, once each time it begins: `parameters` (the first eight), `count`,
      `of`, `ranks` (those that differ from the majority), `last_equal` (ordinal of the last check that found them
      equal, or `None`), `text`. `at` is the batch of the check.
    - `"counters_differ"`: batches begun, `global_step` or learning rate differ; `what`, `values` (one per rank),
      `text`.
    - `"rank_outlier"`: one rank's loss is not finite while others are, or ten times the median in three checks in a
      row; `rank`, `losses`, `text`.

    Gradients of the ranks before averaging are not seen. Strategies that shard weights (FSDP, DeepSpeed) are not
    compared, and the report says so.

    Args:
        every: Check every N batches; under accumulation at the next update.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = whole_number("RankSyncMonitor(every)", every, at_least=1, do="Use 1 for every batch.")
        self._reset()

    def _reset(self) -> None:
        self._parameters: list[Tensor] = []
        self._group: ControlGroup | None = None
        self._due = False
        self._gradients: Tensor | None = None
        self._rate = 0.0
        self._rates: dict[int, float] = {}
        self._pending: deque[_Exchange] = deque()
        self._last_equal: dict[str, int] = {}
        self._apart: set[str] = set()
        self._outlier_rank: tuple[int, int] = (-1, 0)
        """The outlier among the ranks, and for how many checks in a row."""

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        if trainer.world_size == 1:
            return
        if (why := why_no_control_group(trainer)) is not None:
            self.flight.store.note(f"RankSyncMonitor does not compare the ranks: {why}.")
            return
        passed_over = getattr(trainer.strategy.model, "parameters_to_ignore", ())
        ignored = {name.removeprefix("_forward_module.") for name in passed_over}
        named = [(n, p) for n, p in module.named_parameters() if n not in ignored]
        self._parameters = [p for _, p in named]
        names = self.flight.store.layer_names
        names[WEIGHTS] = names[GRADIENTS] = tuple(plain_name(n) for n, _ in named)
        self._group = ControlGroup.of(trainer)

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._gradients = None
        self._due = self._due or (self._group is not None and batch.at.ordinal % self.every == 0)

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        if not self._due:
            return
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = checksums([p.grad if id(p) in mine else None for p in self._parameters])
        known = self._gradients
        self._gradients = gradients if known is None else torch.maximum(known, gradients)
        self._rate = max((g["lr"] for g in optimizer.param_groups if isinstance(g.get("lr"), float)), default=0.0)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        if self._gradients is None:
            return
        self._due = False
        self.flight.recorder.put_vector(GRADIENTS, self._gradients)
        self.flight.recorder.put_vector(WEIGHTS, checksums(self._parameters))
        self._rates[batch.at.ordinal] = self._rate

    @override
    def judge(self, arrival: Arrival) -> None:
        if self._group is None:
            return
        rows = {row.signal: row.values for row in arrival.layers if row.signal in {WEIGHTS, GRADIENTS}}
        if len(rows) == 2 and len(self._pending) < MAX_PENDING:  # noqa: PLR2004 - weights and gradients
            self._send(self._group, arrival, rows)
        while self._pending and self._pending[0].rows.has_arrived:
            self._compare(self._pending.popleft())

    @override
    def release(self) -> None:
        self._reset()

    # -- between the ranks -------------------------------------------------------------------------------------------

    def _send(self, group: ControlGroup, arrival: Arrival, rows: dict[str, Any]) -> None:
        at = arrival.row.at
        head = [arrival.row.values.get("loss", math.nan), at.ordinal, at.step, self._rates.pop(at.ordinal, math.nan)]
        row = np.concatenate([head, rows[WEIGHTS], rows[GRADIENTS]])
        self._pending.append(_Exchange(at=at, rows=group.send(row)))

    def _compare(self, exchange: _Exchange) -> None:
        table = exchange.rows.table()
        losses, counters, sums = table[:, 0], table[:, 1 : len(HEAD)], table[:, len(HEAD) :]
        weights, gradients = np.split(sums, 2, axis=1)
        self._compare_counters(exchange.at, counters)
        self._compare_tensors(exchange.at, "gradient_differs", gradients)
        self._compare_tensors(exchange.at, "weights_differ", weights)
        self._compare_losses(exchange.at, losses)

    def _compare_tensors(self, at: Moment, kind: str, sums: Floats) -> None:
        differ = sums != _majority(sums)
        if not differ.any():
            self._last_equal[kind] = at.ordinal
            self._apart.discard(kind)
            return
        if kind in self._apart:
            return
        self._apart.add(kind)
        names = self.flight.store.layer_names[WEIGHTS]
        apart = [names[k] for k in np.flatnonzero(differ.any(axis=0))]
        ranks = np.flatnonzero(differ.any(axis=1)).tolist()
        what = "weights" if kind == "weights_differ" else "averaged gradients"
        text = (
            f"The {what} of {len(apart)} of {len(names)} parameters are not the same on all ranks "
            f"(apart: {_listed(ranks)}), as under DDP they must be to the bit."
        )
        detail = {
            "parameters": first_names(apart),
            "count": len(apart),
            "of": len(names),
            "ranks": ranks,
            "last_equal": self._last_equal.get(kind),
            "text": text,
        }
        self._find(at, kind, detail)

    def _compare_counters(self, at: Moment, counters: Floats) -> None:
        for name, values in zip(COUNTERS, counters.T, strict=True):
            if np.unique(values[~np.isnan(values)]).size > 1:
                if name not in self._apart:
                    self._apart.add(name)
                    text = f"The ranks are not at the same {name.replace('_', ' ')}: {_listed(values.tolist())}."
                    self._find(at, "counters_differ", {"what": name, "values": values.tolist(), "text": text})
            else:
                self._apart.discard(name)

    def _compare_losses(self, at: Moment, losses: Floats) -> None:
        finite = np.isfinite(losses)
        if finite.any() and not finite.all():
            self._outlier(at, int(np.flatnonzero(~finite)[0]), losses, "is not finite while that of others is")
            return
        rank = int(np.argmax(losses))
        others = np.median(np.delete(losses, rank))
        if not (finite.all() and others > 0 and losses[rank] > OUTLIER_RATIO * others):
            self._outlier_rank = (-1, 0)
            return
        before, count = self._outlier_rank
        self._outlier_rank = (rank, count + 1 if rank == before else 1)
        if self._outlier_rank[1] == MIN_OUTLIER_CHECKS:
            what = f"is more than {OUTLIER_RATIO:g} times the others' in {MIN_OUTLIER_CHECKS} checks in a row"
            self._outlier(at, rank, losses, what)

    def _outlier(self, at: Moment, rank: int, losses: Floats, what: str) -> None:
        finite = [loss if math.isfinite(loss) else None for loss in losses.tolist()]
        self._find(at, "rank_outlier", {"rank": rank, "losses": finite, "text": f"The loss of rank {rank} {what}."})

    def _find(self, at: Moment, kind: str, detail: dict[str, Any]) -> None:
        self.flight.store.note(Finding(detector="ranks", kind=kind, at=at, detail=detail))


def _majority(sums: Floats) -> Floats:
    """The values of most ranks, as the median; of two ranks the first one's."""
    of_two = len(sums) == 2  # noqa: PLR2004 - then no value is the majority
    majority: Floats = sums[0] if of_two else np.sort(sums, axis=0)[(len(sums) - 1) // 2]
    return majority


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
