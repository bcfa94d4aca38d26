"""The most recent batches, by reference: what the dump writes and the lab trains on again, if it comes to that."""

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, TypeGuard

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.sample_ids import SampleIds, SampleIdWatch
from lightning_spike.records import Moment
from lightning_spike.signals.random_state import RandomState

DEPTH: Final = 8
"""Batches kept beyond those of one optimizer step and those whose numbers are still under way: how far an onset may be
dated back."""

MAX_BYTES: Final = 1 << 30
"""Bytes of tensors kept at most; beyond, older batches are let go early, down to those that must stay for the onset to
be in reach at all."""
SHARE_OF_DEVICE: Final = 1 / 64
"""Of the memory of a device that batches lie on, the most that is kept: what a training leaves free is often no more
than some per cent, and to run out of memory for an observer's sake would be the worst harm. 256 MB of 16 GB."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RingEntry:
    """One batch as it was when its forward pass began."""

    at: Moment
    batch: Any
    """The batch in its own structure, containers copied, tensors by reference: on the device where the training has
    them."""
    ids: SampleIds | None
    rng: RandomState
    """Taken before the forward pass."""
    mutated: bool = False
    """`training_step` (or what it called) has changed a tensor of the batch in place: the values are not what the
    forward pass first saw."""


class BatchRing(Participant):
    """Keeps the last batches with their sample ids and random states, until newer ones take their place.

    Nothing is copied but the containers (so that a step which pops its labels out of a dictionary does not empty the
    entry) and the random states, some kilobytes. A batch changed in place, by the step or by a loader that writes the
    next one into the same tensors, is noticed by their version counters and marked. Memory on the host that comes a
    second time while the first batch on it is still held (a loader's own buffer, whose writes do not count) is cloned
    from then on.

    Args:
        depth: Batches kept beyond those of one optimizer step and those still on their way through the recorder.
        max_bytes: Bytes of tensors kept in all, at most; on a device no more than `SHARE_OF_DEVICE` of its memory.
    """

    def __init__(self, depth: int = DEPTH, max_bytes: int = MAX_BYTES) -> None:
        self._depth = depth
        self._max_bytes = max_bytes
        self._entries: dict[int, RingEntry] = {}
        self._bytes: dict[int, int] = {}
        self._versions: dict[int, list[tuple[Tensor, int]]] = {}
        self._places: dict[int, frozenset[int]] = {}
        self._is_reused = False
        self._ids: SampleIdWatch | None = None

    def want(self, depth: int) -> None:
        """What one of those who share it needs: the greatest depth asked for counts, whoever came first.

        The bound on bytes stays.
        """
        self._depth = max(self._depth, depth)

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._ids = self.flight.share(SampleIdWatch, SampleIdWatch, trainer, module)

    def entry(self, ordinal: int) -> RingEntry | None:
        """The batch with this ordinal, `None` where it is gone or has not come."""
        self._mark(ordinal)
        return self._entries.get(ordinal)

    def entries(self) -> list[RingEntry]:
        """All that are held, oldest first."""
        for ordinal in self._entries:
            self._mark(ordinal)
        return list(self._entries.values())

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        ids = self._ids.current if self._ids is not None else None
        ordinal = batch.at.ordinal
        leaves, structure = pytree.tree_flatten(batch.batch)
        places = frozenset(leaf.data_ptr() for leaf in leaves if _lies_on_host(leaf))
        if not self._is_reused:
            self._note_reuse(places)
        leaves = [leaf.clone() if self._is_reused and _lies_on_host(leaf) else leaf for leaf in leaves]
        kept = pytree.tree_unflatten([_own(leaf) for leaf in leaves], structure)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        # the only witness of a change in place
        self._versions[ordinal] = [(tensor, tensor._version) for tensor in tensors]
        self._places[ordinal] = places
        self._entries[ordinal] = RingEntry(at=batch.at, batch=kept, ids=ids, rng=RandomState.take())
        self._bytes[ordinal] = sum(leaf.nbytes for leaf in leaves if _has_bytes(leaf))
        if batch.module.device.type == "cuda":
            self._max_bytes = min(self._max_bytes, _share_of(batch.module.device))
        self._let_go(batch.trainer.accumulate_grad_batches)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self._mark(batch.at.ordinal)

    @override
    def release(self) -> None:
        self._entries.clear()
        self._bytes.clear()
        self._versions.clear()
        self._places.clear()
        self._is_reused = False

    def _mark(self, ordinal: int) -> None:
        if any(tensor._version != version for tensor, version in self._versions.get(ordinal, ())):  # as above
            self._mark_mutated(ordinal)

    def _mark_mutated(self, ordinal: int) -> None:
        self._entries[ordinal] = dataclasses.replace(self._entries[ordinal], mutated=True)
        self._versions[ordinal] = []

    def _note_reuse(self, places: frozenset[int]) -> None:
        for ordinal, held in self._places.items():
            if held & places:
                self._is_reused = True
                self._mark_mutated(ordinal)

    def _let_go(self, per_step: int) -> None:
        """Drop the oldest: beyond the depth always, beyond the bytes only what is not needed for the step under judgement and one before."""
        needed = per_step + self.flight.recorder.lag + 2
        total = sum(self._bytes.values())
        while len(self._entries) > needed and (len(self._entries) > needed + self._depth or total > self._max_bytes):
            oldest = next(iter(self._entries))
            total -= self._bytes.pop(oldest)
            del self._entries[oldest], self._versions[oldest], self._places[oldest]


def _own(leaf: object) -> object:
    """A mapping of the user's own class (a tokenizer's output, say) is copied one level deep.

    Anything else is kept as it is.
    """
    return copy.copy(leaf) if isinstance(leaf, Mapping) else leaf


def _lies_on_host(leaf: object) -> TypeGuard[Tensor]:
    return _has_bytes(leaf) and leaf.device.type == "cpu" and leaf.layout is torch.strided and leaf.data_ptr() != 0


@cache
def _share_of(device: torch.device) -> int:
    """Bytes; read off the device's properties, which does not wait for it."""
    return int(torch.cuda.get_device_properties(device).total_memory * SHARE_OF_DEVICE)


def _has_bytes(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and not leaf.is_sparse and not leaf.is_nested
