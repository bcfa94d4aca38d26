"""`RankSyncMonitor`.

Whether the ranks of a DDP training still hold the same weights, got the same gradients, and are at the same place.
"""

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
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.ranks.control_group import ControlGroup, Exchange, why_no_control_group
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding, Moment
from lightning_spike.signals.ranks import checksums

WEIGHTS: Final = "ranks/weights"
GRADIENTS: Final = "ranks/gradients"
COUNTERS: Final = ("ordinal", "step", "learning_rate")
"""What must be the same on all ranks, beside weights and gradients."""
HEAD: Final = ("loss", *COUNTERS)
OUTLIER: Final = 10.0
"""Times the median of the ranks' losses at which one stands out."""
IN_A_ROW: Final = 3
"""Looks in a row at which the same rank must stand out, unless its loss is not finite: single batches differ."""
UNDER_WAY: Final = 8
"""Exchanges that may be under way at once; where the ranks drift further apart, looks are left out."""
NAMED: Final = 8

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(slots=True)
class _Exchange:
    """One look, on its way to the other ranks."""

    at: Moment
    rows: Exchange


class RankSyncMonitor(SpikeCallback):
    """Compares the ranks of a DDP training every few batches, to the bit.

    With a single process it does nothing, costs nothing and installs nothing.

    After the update of a sampled batch every rank takes a checksum of each parameter, and before it of each gradient
    (after DDP's averaging, before clipping): the vectors `ranks/weights` and `ranks/gradients`, whole numbers below
    2^24, -1 for a parameter without. When they have reached the host they are exchanged over a process group of their
    own (gloo, on the CPU), without anybody waiting: a rank that has ended or failed leaves the others' exchange open
    and holds nobody up. The one collective call that waits is the making of the group, when training starts.

    Findings, on every rank alike, detector `"ranks"`:

    - `"weights_differ"` and `"gradient_differs"`, once each time it begins: `parameters` (the first eight), `count`,
      `of`, `ranks` (those that differ from most others), `last_equal` (ordinal of the last look at which they were
      equal, `None` where there was none), `text`. `at` is the look at which it was seen.
    - `"counters_differ"`: batches begun, `global_step` or learning rate are not the same; `what`, `values` (one for
      each rank), `text`.
    - `"rank_outlier"`: one rank's loss is not finite while others are, or ten times the median at three looks in a row;
      `rank`, `losses`, `text`.

    Gradients of the ranks before averaging are not seen. Strategies that shard weights (FSDP, DeepSpeed) are not
    compared, and the report says so.

    Args:
        every: Batches between two looks; under accumulation the first update from there on.

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
        self._under_way: deque[_Exchange] = deque()
        self._last_equal: dict[str, int] = {}
        self._apart: set[str] = set()
        self._standing_out: tuple[int, int] = (-1, 0)
        """Which rank has stood out, and at how many looks in a row."""

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
        names[WEIGHTS] = names[GRADIENTS] = tuple(n.replace("_orig_mod.", "") for n, _ in named)
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
        if len(rows) == 2 and len(self._under_way) < UNDER_WAY:  # noqa: PLR2004 - weights and gradients
            self._send(self._group, arrival, rows)
        while self._under_way and self._under_way[0].rows.has_arrived:
            self._compare(self._under_way.popleft())

    @override
    def release(self) -> None:
        self._reset()

    # -- between the ranks -------------------------------------------------------------------------------------------

    def _send(self, group: ControlGroup, arrival: Arrival, rows: dict[str, Any]) -> None:
        at = arrival.row.at
        head = [arrival.row.values.get("loss", math.nan), at.ordinal, at.step, self._rates.pop(at.ordinal, math.nan)]
        row = np.concatenate([head, rows[WEIGHTS], rows[GRADIENTS]])
        self._under_way.append(_Exchange(at=at, rows=group.send(row)))

    def _compare(self, exchange: _Exchange) -> None:
        table = exchange.rows.table()
        losses, counters, sums = table[:, 0], table[:, 1 : len(HEAD)], table[:, len(HEAD) :]
        weights, gradients = np.split(sums, 2, axis=1)
        self._compare_counters(exchange.at, counters)
        self._compare_tensors(exchange.at, "gradient_differs", gradients)
        self._compare_tensors(exchange.at, "weights_differ", weights)
        self._compare_losses(exchange.at, losses)

    def _compare_tensors(self, at: Moment, kind: str, sums: Floats) -> None:
        differ = sums != _usual(sums)
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
        detail = {
            "parameters": apart[:NAMED],
            "count": len(apart),
            "of": len(names),
            "ranks": ranks,
            "last_equal": self._last_equal.get(kind),
            "text": f"The {what} of {len(apart)} of {len(names)} parameters are not the same on all ranks (apart: {_listed(ranks)}), as under DDP they must be to the bit.",
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
        if not (finite.all() and others > 0 and losses[rank] > OUTLIER * others):
            self._standing_out = (-1, 0)
            return
        before, count = self._standing_out
        self._standing_out = (rank, count + 1 if rank == before else 1)
        if self._standing_out[1] == IN_A_ROW:
            self._outlier(at, rank, losses, f"is more than {OUTLIER:g} times the others' at {IN_A_ROW} looks in a row")

    def _outlier(self, at: Moment, rank: int, losses: Floats, what: str) -> None:
        told = [loss if math.isfinite(loss) else None for loss in losses.tolist()]
        self._find(at, "rank_outlier", {"rank": rank, "losses": told, "text": f"The loss of rank {rank} {what}."})

    def _find(self, at: Moment, kind: str, detail: dict[str, Any]) -> None:
        self.flight.store.note(Finding(detector="ranks", kind=kind, at=at, detail=detail))


def _usual(sums: Floats) -> Floats:
    """What most ranks have, by the median; of two ranks the first one's."""
    two: Floats = sums[0]
    return two if len(sums) == 2 else np.sort(sums, axis=0)[(len(sums) - 1) // 2]  # noqa: PLR2004 - of two none is the majority


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
