"""Writes into weights and optimizer states from outside the training step, by torch's version counters."""

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

LEARN_BATCHES: Final = 20
"""Batches that establish how often a training step writes each tensor; engineering choice."""
MAX_RARE_SHARE: Final = 0.05
"""Largest share of the batches with an unusual number of writes; averages copied in every few steps are usual;
engineering choice."""
MAX_WRITES: Final = 32
"""Writes that are remembered; engineering choice."""


class OutsideWrites(Participant):
    """Counts per batch how often every weight and optimizer state was written in place.

    A training step writes each of them equally often whenever the optimizers step alike. An update that a loss scaler
    skips is no step, though `global_step` counts it; weight decay adds one write to every step. A higher number that is
    rare in this run is a write from outside: a callback, a hook, a re-initialisation. Reading the version counters
    costs some ten nanoseconds per tensor and no device read. Writes through `.data`, NumPy views or raw memory do not
    count.
    """

    def __init__(self) -> None:
        self.writes: deque[OutsideWrite] = deque(maxlen=MAX_WRITES)
        """The newest, oldest first."""
        self._counts: dict[WriteKind, _WriteCounts] = {"weights": _WriteCounts(), "optimizer": _WriteCounts()}
        self._step = -1
        self._ordinal = -1
        self._handles: list[RemovableHandle] = []
        self._counted: Counter[int] = Counter()
        """Steps of each optimizer in the present batch, by its id."""
        self._stepped: tuple[int, ...] = ()
        """The last batch: number of trained parameters, steps per optimizer, which settings were on. Taken at its end,
        before the lab steps the optimizers."""

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._counts = {"weights": _WriteCounts(), "optimizer": _WriteCounts()}
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in trainer.optimizers]

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        moved = batch.at.step - self._step, *self._stepped
        rolled_back = any(a.action == "rollback" and a.at.ordinal >= self._ordinal for a in self.flight.store.actions)
        tensors: dict[WriteKind, list[Tensor]] = {
            "weights": list(batch.module.parameters()),
            "optimizer": [t for *_, t in _states(batch.trainer.optimizers)],
        }
        for kind, counts in self._counts.items():
            places = counts.update(tensors[kind], moved)
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
        self._counts = {"weights": _WriteCounts(), "optimizer": _WriteCounts()}

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._counted[id(optimizer)] += 1


class _WriteCounts:
    """Writes into each tensor between two batches."""

    def __init__(self) -> None:
        self._versions: list[int] = []
        self._usual: dict[tuple[int, ...], list[int]] = {}
        """Usual writes into each tensor, by what the training step did."""
        self._sums: Counter[tuple[tuple[int, ...], int]] = Counter()

    def update(self, tensors: Sequence[Tensor], moved: tuple[int, ...]) -> list[int]:
        """Read the versions at the beginning of a batch; returns the positions of unusually written tensors.

        Args:
            tensors: All of one kind.
            moved: What the training step did since the last call; each has its usual writes.
        """
        versions = [tensor._version for tensor in tensors]  # the only witness of a write in place
        before, self._versions = self._versions, versions
        if len(before) != len(versions):
            # The first step, and a layer that is unfrozen, create optimizer states.
            self._usual.clear()
            return []
        writes = [now - then for now, then in zip(versions, before, strict=True)]
        key = moved, sum(writes)
        self._sums[key] += 1
        batches = self._sums.total()
        if self._sums[key] > MAX_RARE_SHARE * batches or moved not in self._usual:
            self._usual[moved] = writes
            return []
        if batches < LEARN_BATCHES:
            return []
        return [k for k, (now, usual) in enumerate(zip(writes, self._usual[moved], strict=True)) if now > usual]


def _switched_on(optimizers: Sequence[Optimizer]) -> Iterator[int]:
    """Whether each host setting but the learning rate is non-zero, which decides the operations of a step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (int(bool(v)) for name, v in group.items() if name != "lr" and isinstance(v, (bool, int, float)))


def _states(optimizers: Sequence[Optimizer]) -> Iterator[tuple[object, str, Tensor]]:
    """Parameter, name and tensor of all optimizer states but step counts on the host, which some write twice."""
    for optimizer in optimizers:
        for parameter, entry in optimizer.state.items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    yield parameter, key, value


def _names(kind: WriteKind, batch: TrainingBatch) -> list[str]:
    by_parameter: dict[object, str] = {parameter: name for name, parameter in batch.module.named_parameters()}
    if kind == "weights":
        return list(by_parameter.values())
    states = _states(batch.trainer.optimizers)
    return [f"{by_parameter.get(parameter, 'a parameter')}.{key}" for parameter, key, _ in states]
