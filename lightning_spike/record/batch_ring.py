"""Ring of the most recent batches, by reference, for dumps and replays."""

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
"""Batches beyond those of one optimizer step and those still on their way to the host; bounds how far an onset can be
dated back; engineering choice."""

MAX_BYTES: Final = 1 << 30
"""Bytes of tensors in all; beyond, older batches are dropped, except those that the onset needs; engineering choice."""
MAX_DEVICE_SHARE: Final = 1 / 64
"""Largest share of a device's memory, 256 MB of 16 GB: a training often leaves a few per cent free;
engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RingEntry:
    """One batch as it was when its forward pass began."""

    at: Moment
    batch: Any
    """The batch in its structure: containers copied, tensors by reference, on the training's device."""
    ids: SampleIds | None
    rng: RandomState
    """Taken before the forward pass."""
    mutated: bool = False
    """Whether a tensor of the batch was changed in place since its forward pass began."""


@dataclasses.dataclass(slots=True, kw_only=True)
class _Held:
    """A batch with what shows that it was changed in place."""

    entry: RingEntry
    nbytes: int
    versions: list[tuple[Tensor, int]]
    addresses: frozenset[int]
    """Where its tensors on the host lie."""

    def marked(self) -> RingEntry:
        """The entry, marked if a tensor was changed in place."""
        if any(tensor._version != version for tensor, version in self.versions):  # as said
            self.mark()
        return self.entry

    def mark(self) -> None:
        """Mark the entry as changed in place."""
        self.entry = dataclasses.replace(self.entry, mutated=True)
        self.versions = []


class BatchRing(Participant):
    """Keeps the last batches with their sample ids and random states.

    Copies only containers (a step can pop its labels out of a dictionary) and random states, some kilobytes. Version
    counters show a batch that was changed in place, by the step or by a loader that reuses its tensors; it is marked.
    Host memory that returns while an earlier batch on it is held is a loader's buffer, and is cloned from then on.

    Args:
        depth: Batches beyond those of one optimizer step and those still on their way through the recorder.
        max_bytes: Largest number of bytes of tensors; on a device at most `MAX_DEVICE_SHARE` of its memory.
    """

    def __init__(self, depth: int = DEPTH, max_bytes: int = MAX_BYTES) -> None:
        self._depth = depth
        self._max_bytes = max_bytes
        self._held: dict[int, _Held] = {}
        self._is_reused = False
        self._ids: SampleIdWatch | None = None

    def want(self, depth: int) -> None:
        """Ask for a depth; the greatest one counts. The bound on bytes stays."""
        self._depth = max(self._depth, depth)

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._ids = self.flight.share(SampleIdWatch, SampleIdWatch, trainer, module)

    def entry(self, ordinal: int) -> RingEntry | None:
        """The batch with this ordinal; `None` where it is not held."""
        held = self._held.get(ordinal)
        return None if held is None else held.marked()

    def entries(self) -> list[RingEntry]:
        """All batches that are held, oldest first."""
        return [held.marked() for held in self._held.values()]

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        ids = self._ids.current if self._ids is not None else None
        leaves, structure = pytree.tree_flatten(batch.batch)
        addresses = frozenset(leaf.data_ptr() for leaf in leaves if _is_on_host(leaf))
        if not self._is_reused:
            for held in self._held.values():
                if held.addresses & addresses:
                    self._is_reused = True
                    held.mark()
        leaves = [leaf.clone() if self._is_reused and _is_on_host(leaf) else leaf for leaf in leaves]
        kept = pytree.tree_unflatten([_own(leaf) for leaf in leaves], structure)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        self._held[batch.at.ordinal] = _Held(
            entry=RingEntry(at=batch.at, batch=kept, ids=ids, rng=RandomState.take()),
            nbytes=sum(leaf.nbytes for leaf in leaves if _has_bytes(leaf)),
            versions=[(tensor, tensor._version) for tensor in tensors],  # the only witness of a change in place
            addresses=addresses,
        )
        if batch.module.device.type == "cuda":
            self._max_bytes = min(self._max_bytes, _max_bytes_on(batch.module.device))
        self._drop_oldest(batch.trainer.accumulate_grad_batches)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self.entry(batch.at.ordinal)

    @override
    def release(self) -> None:
        self._held.clear()
        self._is_reused = False

    def _drop_oldest(self, per_step: int) -> None:
        """Drop batches beyond the depth; beyond the bytes, only those that the judged step and the one before allow."""
        needed = per_step + self.flight.recorder.lag + 2
        total = sum(held.nbytes for held in self._held.values())
        while len(self._held) > needed and (len(self._held) > needed + self._depth or total > self._max_bytes):
            total -= self._held.pop(next(iter(self._held))).nbytes


def _own(leaf: object) -> object:
    """A shallow copy of a mapping of the user's own class (such as a tokenizer's output); else the leaf itself."""
    return copy.copy(leaf) if isinstance(leaf, Mapping) else leaf


def _is_on_host(leaf: object) -> TypeGuard[Tensor]:
    return _has_bytes(leaf) and leaf.device.type == "cpu" and leaf.layout is torch.strided and leaf.data_ptr() != 0


@cache
def _max_bytes_on(device: torch.device) -> int:
    """Bytes by the device's properties, without waiting for it."""
    return int(torch.cuda.get_device_properties(device).total_memory * MAX_DEVICE_SHARE)


def _has_bytes(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and not leaf.is_sparse and not leaf.is_nested
