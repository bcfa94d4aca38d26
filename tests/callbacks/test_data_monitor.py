"""Statistics of the batches against numpy; drift, wrong labels and weights that pile up from real faults."""

import numpy as np
import pytest
import torch
from callbacks.watching import recorded, store_of, watched
from lightning.pytorch import Callback
from torch.utils.data import Dataset
from training_tasks import Digits, digits

from lightning_spike import BadBatchDumper, DataMonitor
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import SortedStretch, TokenDrift, ValueDrift, WeightsPileUp


class Batches(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


def test_statistics_are_those_of_the_batches(tmp_path):
    batches = Batches()
    store = watched("cnn", [batches, DataMonitor()], tmp_path, max_epochs=1)
    inputs, targets = zip(*batches.seen, strict=True)
    np.testing.assert_allclose(recorded(store, "batch/input/mean"), [float(x.mean()) for x in inputs], rtol=1e-4)
    counts = [np.bincount(y, minlength=64) for y in targets]
    shares = [c[c > 0] / c.sum() for c in counts]
    np.testing.assert_allclose(
        recorded(store, "batch/target/entropy"), [-(p * np.log(p)).sum() for p in shares], rtol=1e-4
    )
    np.testing.assert_allclose(recorded(store, "batch/target/largest"), [p.max() for p in shares], rtol=1e-5)
    np.testing.assert_array_equal([r.values for r in store.layers["batch/target/histogram"]], counts)


def test_with_the_dumper_they_are_measured_once_and_the_dumper_alone_measures_the_same(tmp_path):
    alone = watched("cnn", [BadBatchDumper(dirpath=tmp_path)], tmp_path, max_epochs=1)
    both = watched("cnn", [DataMonitor(), BadBatchDumper(dirpath=tmp_path)], tmp_path, max_epochs=1)
    named = [s for s in alone.history.signals if s.startswith("batch/")]
    assert set(named) >= {"batch/input/mean", "batch/target/longest_run"}
    for signal in named:
        np.testing.assert_array_equal(recorded(alone, signal), recorded(both, signal))


class Mapped(Dataset):
    """Digits as a mapping with names that no convention knows."""

    def __init__(self):
        self.images, self.classes = digits().tensors

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        return {"pixels": self.images[k], "mask": torch.ones(3), "kind": self.classes[k], "weight": torch.ones(())}


class OnMapped(Digits):
    def training_step(self, batch, batch_idx):
        each = torch.nn.functional.cross_entropy(self(batch["pixels"]), batch["kind"], reduction="none")
        return (each * batch["weight"]).mean()


@pytest.mark.parametrize("order", [1, -1])
def test_which_part_is_what_can_be_said_on_either_callback(order, tmp_path):
    callbacks = [DataMonitor(input="pixels"), BadBatchDumper(dirpath=tmp_path, target="kind")][::order]
    store = store_of(OnMapped(), callbacks, tmp_path, dataset=Mapped(), max_steps=3)
    named = {s for s in store.history.signals if s.startswith("batch/")}
    assert {"batch/input.pixels/mean", "batch/target.kind/entropy", "batch/weight.weight/ess"} <= named
    assert not any("mask" in signal for signal in named)


class Tokens(Dataset):
    """Tokens of sixteen kinds, the more frequent the smaller their number."""

    def __init__(self):
        shares = 1.0 / torch.arange(1, 17)
        self.tokens = torch.multinomial(
            shares, 512 * 20, replacement=True, generator=torch.Generator().manual_seed(3)
        ).reshape(512, 20)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, k):
        return {"tokens": self.tokens[k], "label": self.tokens[k, 0] % 10}


class Counted(Digits):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 10)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.embedding(batch["tokens"]).mean(1), batch["label"])


def test_weights_that_pile_up(tmp_path):
    fault = WeightsPileUp.strong(at=16)
    store = store_of(OnMapped(), [fault, DataMonitor(target="kind")], tmp_path, dataset=Mapped(), max_epochs=1)
    ess = recorded(store, "batch/weight.weight/ess")
    np.testing.assert_allclose(ess[:16], 1.0)
    assert ess[20:].min() < 0.7


def test_a_sorted_stretch(tmp_path):
    store = watched("cnn", [SortedStretch.strong(at=41), DataMonitor()], tmp_path, max_epochs=2)
    largest = recorded(store, "batch/target/largest")
    assert largest[41:50].max() > 2 * np.median(largest[:41])


def test_drift_of_the_input(tmp_path):
    """Against a run without the fault, over several epochs: there it stays small."""
    clean = watched("cnn", [DataMonitor()], tmp_path, max_epochs=8)
    moved = watched("cnn", [ValueDrift.strong(at=128), DataMonitor()], tmp_path, max_epochs=8)
    quiet, loud = recorded(clean, "batch/input/drift"), recorded(moved, "batch/input/drift")
    assert len(quiet) == 256 - 64
    assert quiet.max() < 6
    assert loud[-60:].max() > 10
    np.testing.assert_array_equal(loud[:60], quiet[:60])


def test_drift_of_tokens(tmp_path):
    """Windows of a text with words of ever the same kinds, against the same with a part of the kinds renamed."""
    clean = store_of(Counted(), [DataMonitor()], tmp_path, dataset=Tokens(), max_epochs=6)
    moved = store_of(Counted(), [TokenDrift.mild(at=96), DataMonitor()], tmp_path, dataset=Tokens(), max_epochs=6)
    quiet, loud = recorded(clean, "batch/input.tokens/drift"), recorded(moved, "batch/input.tokens/drift")
    assert quiet.max() < 4
    assert loud[-16:].min() > 8
    np.testing.assert_allclose(quiet[:30], loud[:30])
    counts = recorded(clean, "batch/input.tokens/entropy")
    assert (counts > 0).all()


@pytest.mark.parametrize("option", ["input", "target", "weight"])
@pytest.mark.parametrize("bad", ["", 3])
def test_a_bad_argument_is_refused_at_construction(option, bad):
    with pytest.raises(ConfigurationError, match=option):
        DataMonitor(**{option: bad})
