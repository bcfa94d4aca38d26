"""The truth in all of these is in the batch itself: every sample carries its own index as its value."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    random_split,
)

from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.sample_ids import SampleIdWatch
from lightning_spike.store import TrainerStateStore


class Indices(Dataset):
    def __init__(self, size: int = 22) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Stream(IterableDataset):
    def __iter__(self):
        return (torch.tensor([float(k)]) for k in range(12))


class Ready:
    """A loader of a user's own."""

    def __iter__(self):
        return iter([torch.ones(4, 1)] * 3)


class Module(LightningModule):
    def __init__(self, raise_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.raise_at = raise_at

    def training_step(self, batch, batch_idx):
        if batch_idx == self.raise_at:
            msg = "the user's own"
            raise RuntimeError(msg)
        leaves = [t.float().reshape(-1, 1) for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        return self.layer(torch.cat(leaves) / 100).square().mean()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Probe(SpikeCallback):
    def __init__(self) -> None:
        self.seen = []

    def attach(self, trainer, module):
        self.watch = self.flight.share(SampleIdWatch, SampleIdWatch, trainer, module)

    def sense_batch(self, batch):
        self.seen.append((batch.batch, self.watch.current))


def fit(loader, probe: Probe | None, root: Path, *, module: Module | None = None, val=None, **options) -> Trainer:
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "default_root_dir": root}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**(defaults | quiet | options), callbacks=[] if probe is None else [probe])
    trainer.fit(module or Module(), loader, val)
    return trainer


def assert_named(probe: Probe, *, epochs: int = 3) -> None:
    assert len(probe.seen) >= epochs
    for batch, ids in probe.seen:
        assert ids is not None
        assert list(ids.indices) == [int(v) for v in batch.flatten()]
        assert all(type(index) is int for index in ids.indices)


class NumpySampler:
    """A sampler as users write them: no length, numpy's whole numbers."""

    def __iter__(self):
        return iter(np.random.default_rng(1).permutation(22))


LOADERS = {
    "shuffled": lambda: DataLoader(Indices(), batch_size=4, shuffle=True),
    "two workers": lambda: DataLoader(Indices(), batch_size=4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Indices(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "drop last": lambda: DataLoader(Indices(), batch_size=4, shuffle=True, drop_last=True),
    "samples one by one": lambda: DataLoader(Indices(), batch_size=None, shuffle=True),
    "own batch sampler": lambda: DataLoader(
        Indices(), batch_sampler=BatchSampler(RandomSampler(Indices()), batch_size=5, drop_last=False)
    ),
    "own sampler, no length": lambda: DataLoader(Indices(), batch_size=4, sampler=NumpySampler()),
    "concatenated": lambda: DataLoader(ConcatDataset([Indices()]), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_names_every_batch(name, tmp_path):
    probe = Probe()
    fit(LOADERS[name](), probe, tmp_path)
    assert_named(probe)


def test_subset_positions_become_dataset_indices_however_nested(tmp_path):
    part, _ = random_split(Indices(), [16, 6], generator=torch.Generator().manual_seed(5))
    nested = Subset(part, list(range(1, 16, 2)))
    probe = Probe()
    fit(DataLoader(nested, batch_size=3, shuffle=True), probe, tmp_path)
    assert_named(probe)
    assert {i for _, ids in probe.seen for i in ids.indices} == {part.indices[k] for k in range(1, 16, 2)}


@pytest.mark.parametrize("workers", [0, 2])
def test_lists_drawn_ahead_and_never_used_are_void_in_the_next_epoch(workers, tmp_path):
    probe = Probe()
    fit(DataLoader(Indices(), batch_size=2, shuffle=True, num_workers=workers), probe, tmp_path, limit_train_batches=3)
    assert len(probe.seen) == 9
    assert_named(probe)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_the_same_loader_for_validation_does_not_confuse(tmp_path):
    loader = DataLoader(Indices(), batch_size=4, shuffle=True)
    probe = Probe()
    fit(loader, probe, tmp_path, val=loader, val_check_interval=2)
    assert_named(probe)


def test_a_module_that_iterates_the_loader_itself_does_not_confuse(tmp_path):
    class Peeks(Module):
        def on_train_batch_end(self, *_):
            next(iter(self.trainer.train_dataloader))

    probe = Probe()
    fit(DataLoader(Indices(), batch_size=4, shuffle=True), probe, tmp_path, module=Peeks())
    assert_named(probe)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_that_lightning_skips_does_not_shift_the_rest(tmp_path):
    class Skips(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return None if self.trainer.training and 3.0 in batch.flatten().tolist() else batch

    probe = Probe()
    fit(DataLoader(Indices(), batch_size=4, shuffle=True), probe, tmp_path, module=Skips())
    assert len(probe.seen) == 15
    assert_named(probe)


def test_a_run_resumed_inside_an_epoch_is_named_from_its_first_batch(tmp_path):
    seed_everything(1, verbose=False)
    loader = DataLoader(Indices(), batch_size=4, shuffle=True)
    first = fit(loader, None, tmp_path, max_steps=8)
    first.save_checkpoint(tmp_path / "inside.ckpt")
    probe = Probe()
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[probe],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), loader, ckpt_path=tmp_path / "inside.ckpt")
    assert trainer.current_epoch == 4
    assert_named(probe, epochs=2)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders_are_named_one_by_one(mode, tmp_path):
    loaders = {
        "a": DataLoader(Indices(22), batch_size=4, shuffle=True),
        "b": DataLoader(Indices(9), batch_size=3, shuffle=True),
    }
    probe = Probe()
    fit(CombinedLoader(loaders, mode), probe, tmp_path)
    for batch, ids in probe.seen:
        told = {part.loader: list(part.indices) for part in ids.loaders}
        held = {str(k): batch[name] for k, name in enumerate(loaders) if batch[name] is not None}
        assert told == {k: [int(v) for v in part.flatten()] for k, part in held.items()}
        assert ids.indices == () or len(held) == 1


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream is an IterableDataset"),
        (Ready, "Ready is no torch DataLoader"),
        (lambda: DataLoader(Indices(), batch_size=4, num_workers=2, in_order=False), "in_order=False"),
    ],
    ids=["stream", "own iterable", "out of order"],
)
def test_what_cannot_be_named_is_said_once(loader, why, tmp_path):
    probe = Probe()
    trainer = fit(loader(), probe, tmp_path)
    assert [ids for _, ids in probe.seen] == [None] * len(probe.seen)
    remarks = TrainerStateStore.of(trainer).remarks
    assert len([r for r in remarks if why in r]) == 1


def test_loaders_of_which_one_has_no_length_are_not_named_wrongly(tmp_path):
    loaders = {
        "a": DataLoader(Indices(5), batch_size=2, shuffle=True),
        "b": DataLoader(Stream(), batch_size=2),
    }
    probe = Probe()
    trainer = fit(loaders, probe, tmp_path, max_epochs=2)
    assert all(ids is None for _, ids in probe.seen)
    assert any("one of several loaders has no length" in r for r in TrainerStateStore.of(trainer).remarks)


@pytest.mark.parametrize("kind", ["shuffled", "persistent workers", "samples one by one"])
@pytest.mark.parametrize("raise_at", [None, 2], ids=["to the end", "exception"])
def test_all_wrapping_is_taken_off_again(kind, raise_at, tmp_path):
    loader = LOADERS[kind]()
    before = (loader.batch_sampler, loader.sampler)
    probe = Probe()
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**defaults, **quiet, callbacks=[probe])
    if raise_at is None:
        trainer.fit(Module(), loader)
    else:
        with pytest.raises(RuntimeError, match="the user's own"):
            trainer.fit(Module(raise_at), loader)
    assert (loader.batch_sampler, loader.sampler) == before
    assert "process_dataloader" not in vars(trainer.strategy)
    iterator = getattr(loader, "_iterator", None)
    assert iterator is None or iterator._index_sampler is before[0]


def test_a_second_fit_with_the_same_trainer_and_loader_is_named_too(tmp_path):
    loader = LOADERS["persistent workers"]()
    probe = Probe()
    trainer = fit(loader, probe, tmp_path, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    probe.seen.clear()
    trainer.fit(Module(), loader)
    assert len(probe.seen) == 6
    assert_named(probe, epochs=1)


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_the_order_of_the_batches_is_the_same_with_and_without(name, tmp_path):
    def order(probe: Probe | None) -> list[list[float]]:
        seed_everything(7, verbose=False)
        seen: list[list[float]] = []

        class Notes(Module):
            def training_step(self, batch, batch_idx):
                seen.append(batch.flatten().tolist())
                return super().training_step(batch, batch_idx)

        fit(LOADERS[name](), probe, tmp_path, module=Notes())
        return [*seen, torch.rand(3).tolist()]

    assert order(Probe()) == order(None)


def test_a_watched_sampler_is_the_sampler_for_all_who_look_at_it(tmp_path):
    class Looks(Module):
        def on_train_epoch_start(self):
            sampler = self.trainer.train_dataloader.batch_sampler
            told.append((sampler.batch_size, len(sampler)))
            sampler.drop_last = True

    told: list[tuple[int, int]] = []
    loader = DataLoader(Indices(), batch_size=4)
    fit(loader, Probe(), tmp_path, module=Looks(), max_epochs=2)
    assert told == [(4, 6), (4, 5)]
    assert loader.batch_sampler.drop_last
