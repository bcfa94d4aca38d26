"""Who else writes into weights and optimizer states.

Noticed by the version counters that torch keeps, without a look at the values.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_spike.experiments import OutsideWrite, WriteKind
from lightning_spike.record.participant import Participant, TrainingBatch

LEARN: Final = 20
"""Batches after which it is known how often a training step writes into each tensor."""
RARE: Final = 0.05
"""Share of the batches up to which a number of writes is not the training's own rhythm: averages that are copied in
every few steps are."""
KEPT: Final = 32
"""Writes remembered."""


class OutsideWrites(Participant):
    """Counts, batch by batch, how often every weight and every optimizer state was written to in place.

    A training step writes into each of them the same number of times whenever the optimizers step alike: an update that
    a loss scaler skips is no step, though `global_step` counts it; and a weight decay that is switched on is one more
    write in every step.
    A higher number that is rare in this run means that somebody else has written too: a callback, a hook, a
    re-initialisation. Reading torch's version counters costs some ten nanoseconds a tensor and no look at the device.
    Not seen are writes through `.data`, NumPy views or raw memory, which do not count.
    """

    def __init__(self) -> None:
        self.writes: deque[OutsideWrite] = deque(maxlen=KEPT)
        """The newest, oldest first."""
        self._books: dict[WriteKind, _Book] = {"weights": _Book(), "optimizer": _Book()}
        self._step = -1
        self._ordinal = -1
        self._handles: list[RemovableHandle] = []
        self._counted: Counter[int] = Counter()
        """Steps that each optimizer made in the present batch, by its identity."""
        self._stepped: tuple[int, ...] = ()
        """… in the batch before this one: counted up to its end, for a lab steps them after that and takes it back.
        First how many parameters were trained, last which settings of the optimizers are on."""

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._books = {"weights": _Book(), "optimizer": _Book()}
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in trainer.optimizers]

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        moved = batch.at.step - self._step, *self._stepped
        rolled_back = any(a.action == "rollback" and a.at.ordinal >= self._ordinal for a in self.flight.store.actions)
        tensors: dict[WriteKind, list[Tensor]] = {
            "weights": list(batch.module.parameters()),
            "optimizer": [t for _, t in _states(batch.trainer.optimizers)],
        }
        for kind, book in self._books.items():
            places = book.turn(tensors[kind], moved)
            if places and not rolled_back:
                names = _names(kind, batch)
                written = tuple(names[place] for place in places)
                self.writes.append(OutsideWrite(ordinal=self._ordinal, kind=kind, names=written))
        self._step, self._ordinal = batch.at.step, batch.at.ordinal
        self._counted.clear()

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        trained = sum(parameter.requires_grad for parameter in batch.module.parameters())
        steps = (self._counted[id(optimizer)] for optimizer in batch.trainer.optimizers)
        self._stepped = trained, *steps, *_switched_on(batch.trainer.optimizers)

    @override
    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._books = {"weights": _Book(), "optimizer": _Book()}

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._counted[id(optimizer)] += 1


class _Book:
    """How often each of some tensors was written to from one batch to the next."""

    def __init__(self) -> None:
        self._versions: list[int] = []
        self._usual: dict[tuple[int, ...], list[int]] = {}
        """The writes into each tensor as they last usually were, by what the training step did."""
        self._sums: Counter[tuple[tuple[int, ...], int]] = Counter()

    def turn(self, tensors: Sequence[Tensor], moved: tuple[int, ...]) -> list[int]:
        """Take in the versions at the beginning of a batch.

        The places of the tensors that were written to unusually often since the last one.

        Args:
            tensors: All of a kind.
            moved: What the training step did since the last call: the rhythm is another where this is.
        """
        versions = [tensor._version for tensor in tensors]  # the only witness of a write in place
        before, self._versions = self._versions, versions
        if len(before) != len(versions):
            # Optimizer states come to be with the first step, and when a layer is unfrozen.
            self._usual.clear()
            return []
        writes = [now - then for now, then in zip(versions, before, strict=True)]
        key = moved, sum(writes)
        self._sums[key] += 1
        batches = self._sums.total()
        if self._sums[key] > RARE * batches or moved not in self._usual:
            self._usual[moved] = writes
            return []
        if batches < LEARN:
            return []
        return [k for k, (now, usual) in enumerate(zip(writes, self._usual[moved], strict=True)) if now > usual]


def _switched_on(optimizers: Sequence[Optimizer]) -> Iterator[int]:
    """Whether each setting is on, i.e. neither 0 nor False: it decides which operations a step is made of.

    Learning rates are not asked, nor is what is on a device.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (int(bool(v)) for name, v in group.items() if name != "lr" and isinstance(v, (bool, int, float)))


def _states(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """State tensors of all optimizers; a step count on the host, which some write twice, is left out."""
    for optimizer in optimizers:
        for entry in optimizer.state.values():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    yield key, value


def _names(kind: WriteKind, batch: TrainingBatch) -> list[str]:
    by_parameter: dict[object, str] = {parameter: name for name, parameter in batch.module.named_parameters()}
    if kind == "weights":
        return list(by_parameter.values())
    return [
        f"{by_parameter.get(parameter, 'a parameter')}.{key}"
        for optimizer in batch.trainer.optimizers
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor) and value.dim() > 0
    ]
