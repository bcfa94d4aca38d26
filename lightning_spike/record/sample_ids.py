"""Dataset indices of the samples in a batch, from the loader's sampler.

With workers, the sampler runs several batches ahead of the training, so its index lists are numbered and looked up by
the position of the batch in its epoch. Samplers are wrapped, not replaced: they draw the same indices at the same time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, Subset
from typing_extensions import override

from lightning_spike.record.participant import Participant, TrainingBatch

NO_IDS: Final = "Samples cannot be named by their dataset index"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoaderIds:
    """The samples of one loader in a batch."""

    loader: str
    """Index of the loader in a `CombinedLoader`; `"0"` for a single one."""
    drawn: tuple[Any, ...]
    """The draws of the sampler in the order of the batch, usually positions in the loader's dataset."""
    dataset: Any = dataclasses.field(repr=False)

    @property
    def indices(self) -> tuple[Any, ...]:
        """Indices in the underlying dataset, through nested `Subset`s (`random_split`); integers become `int`."""
        return tuple(_underlying(self.dataset, _plain(index)) for index in self.drawn)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleIds:
    """The samples in one batch."""

    loaders: tuple[LoaderIds, ...]
    """One entry per loader with known samples."""

    @property
    def indices(self) -> tuple[Any, ...]:
        """Dataset indices by position in the batch; empty for several loaders."""
        return self.loaders[0].indices if len(self.loaders) == 1 else ()


class SampleIdWatch(Participant):
    """Wraps the samplers of the training loaders to find the ids of the present batch.

    Wraps in `Strategy.process_dataloader`, after Lightning's `DistributedSampler` and before the first iterator.
    Unknown samples (an `IterableDataset`, an iterable that is no `DataLoader`, workers with `in_order=False`, a
    stateful loader resumed inside an epoch) give one remark in the store. `release` removes all wrappers.
    """

    def __init__(self) -> None:
        self.current: SampleIds | None = None
        """Ids of the present batch; `None` where unknown."""
        self._taps: list[_Tap] = []
        self._undo: Callable[[], None] | None = None
        self._first_position: int | None = None
        self._first_epoch = 0

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def process_and_watch(dataloader: object) -> object:
            if trainer.training and self._undo is not None:
                self._watch(dataloader, lambda: trainer.training)
            return process(dataloader)

        def undo() -> None:
            if vars(strategy).get("process_dataloader") is process_and_watch:
                del strategy.process_dataloader

        strategy.process_dataloader = process_and_watch  # type: ignore[method-assign]
        self._undo = undo

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        loaders = _loaders(trainer)
        if len(loaders) > 1 and len(self._taps) < len(loaders) and trainer.num_training_batches == float("inf"):
            self._disable("one of several loaders has no length, so Lightning prefetches from all of them")

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        position = self._position(batch)
        known = [] if isinstance(batch.batch, Iterator) else list(self._known(batch.trainer, position))
        self.current = SampleIds(loaders=tuple(known)) if known else None

    @override
    def release(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def _position(self, batch: TrainingBatch) -> int:
        """Number of earlier batches of this epoch's iterators, which are new after a resume inside an epoch."""
        if self._first_position is None or batch.at.epoch != self._first_epoch:
            resumed = self._first_position is None and batch.trainer.ckpt_path is not None
            self._first_position = batch.at.batch_idx if resumed else 0
            self._first_epoch = batch.at.epoch
            if self._first_position and any(hasattr(tap.loader, "load_state_dict") for tap in self._taps):
                self._disable("a stateful loader was resumed inside an epoch")
        return batch.at.batch_idx - self._first_position

    def _watch(self, dataloader: object, is_training: Callable[[], bool]) -> None:
        if not isinstance(dataloader, DataLoader):
            self.flight.store.note(f"{NO_IDS}: {type(dataloader).__name__} is no torch DataLoader.")
        elif isinstance(dataloader.dataset, IterableDataset):
            self.flight.store.note(f"{NO_IDS}: {type(dataloader.dataset).__name__} is an IterableDataset.")
        elif dataloader.num_workers > 0 and not getattr(dataloader, "in_order", True):
            self.flight.store.note(f"{NO_IDS}: the DataLoader has workers and in_order=False.")
        elif all(tap.loader is not dataloader for tap in self._taps):
            self._taps.append(_Tap(dataloader, is_training))

    def _disable(self, why: str) -> None:
        self.flight.store.note(f"{NO_IDS}: {why}.")
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def _known(self, trainer: Trainer, position: int) -> Iterator[LoaderIds]:
        """Ids of the present loaders, in their order."""
        # see `_loaders`
        iterators = getattr(getattr(trainer.fit_loop._combined_loader, "_iterator", None), "iterators", [])
        for index, loader in enumerate(_loaders(trainer)):
            tap = next((tap for tap in self._taps if tap.loader is loader), None)
            iterator = iterators[index] if index < len(iterators) else None
            ids = None if tap is None else tap.take(position, str(index), iterator)
            if ids is not None:
                yield ids


def _loaders(trainer: Trainer) -> list[Any]:
    """The training loaders in the order of iteration."""
    # `trainer.train_dataloader` is the user's collection, not the loaders in order
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


class _Tap:
    """The wrapper of one loader's sampler, and the iterator of the training."""

    def __init__(self, loader: "DataLoader[Any]", is_training: Callable[[], bool]) -> None:
        self.loader = loader
        self._is_training = is_training
        self._attribute = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        self._sampler = getattr(loader, self._attribute)
        self._watched = _WatchedSampler(self._sampler, self)
        self._current: _WatchedIterator | None = None
        self._put(self._sampler, self._watched)

    def iterate(self) -> "Iterator[Any]":
        """An iterator over the sampler, watched only in training (not if the loader is used for validation)."""
        iterator: Iterator[Any] = iter(self._sampler)
        if not self._is_training():
            return iterator
        self._current = _WatchedIterator(iterator)
        return self._current

    def take(self, position: int, name: str, loader_iterator: object) -> LoaderIds | None:
        """The samples of the batch at this position of the epoch.

        Args:
            position: Number of earlier batches of this epoch.
            name: Name of the loader in the result.
            loader_iterator: Lightning's iterator where known, as user code can begin another one.
        """
        in_use = getattr(loader_iterator, "_sampler_iter", None)
        iterator = in_use if isinstance(in_use, _WatchedIterator) else self._current
        drawn = None if iterator is None else iterator.take(position - self._in_earlier_rounds(position))
        if drawn is None:
            return None
        is_list = isinstance(drawn, (list, tuple)) and self._attribute == "batch_sampler"
        return LoaderIds(loader=name, drawn=tuple(drawn) if is_list else (drawn,), dataset=self.loader.dataset)

    def remove(self) -> None:
        """Restore the loader's sampler, also in an iterator of persistent workers."""
        self._put(self._watched, self._sampler)
        if self._current is not None:
            self._current.stop()
            self._current = None

    def _in_earlier_rounds(self, position: int) -> int:
        """Batches of this epoch from earlier iterators: a `CombinedLoader` restarts its shorter loaders."""
        try:
            length = len(self._watched)
        except TypeError:
            return 0
        return position // length * length if length else 0

    def _put(self, present: object, new: object) -> None:
        """Set the sampler, despite DataLoader's check, and that in the iterator of persistent workers."""
        if getattr(self.loader, self._attribute) is present:
            object.__setattr__(self.loader, self._attribute, new)
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and getattr(iterator, "_index_sampler", None) is present:
            iterator._index_sampler = new  # not public


class _WatchedSampler:
    """A wrapper that forwards everything but `__iter__` to the sampler."""

    def __init__(self, sampler: Any, tap: _Tap) -> None:
        object.__setattr__(self, "_watched", (sampler, tap))

    def __iter__(self) -> Iterator[Any]:
        tap: _Tap = object.__getattribute__(self, "_watched")[1]
        return tap.iterate()

    def __len__(self) -> int:
        return len(object.__getattribute__(self, "_watched")[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_watched")[0], name)

    @override
    def __setattr__(self, name: str, value: object) -> None:
        setattr(object.__getattribute__(self, "_watched")[0], name, value)


class _WatchedIterator:
    """Forwards and numbers the draws of the sampler; other attributes are the iterator's, for stateful loaders."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._pending: dict[int, Any] | None = {}
        self._drawn = 0

    def __iter__(self) -> "_WatchedIterator":
        return self

    def __next__(self) -> Any:
        drawn = next(self._iterator)
        if self._pending is not None:
            self._pending[self._drawn] = drawn
            self._drawn += 1
        return drawn

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":  # a copy under construction
            raise AttributeError(name)
        return getattr(self._iterator, name)

    def take(self, position: int) -> Any:
        """The draw at this position, `None` where unknown; forgets it and all before."""
        pending = self._pending or {}
        drawn = pending.get(position)
        for old in [p for p in pending if p <= position]:
            del pending[old]
        return drawn

    def stop(self) -> None:
        """Stop recording."""
        self._pending = None


def _plain(index: object) -> object:
    """An `int` for numpy's and torch's integers, else the index itself."""
    to_int = getattr(index, "__index__", None)
    if to_int is None or isinstance(index, bool):
        return index
    try:
        return int(to_int())
    except TypeError:  # an array or a floating tensor has the method and refuses
        return index


def _underlying(dataset: object, index: object) -> object:
    while isinstance(dataset, Subset) and isinstance(index, int):
        index = _plain(dataset.indices[index])
        dataset = dataset.dataset
    return index
