"""A stretch that came sorted, against one of bad samples: whether it is the order that makes the losses high."""

import torch
from lab.episodes import examined, measured
from lab.made import entry
from torch.utils.data import TensorDataset
from training_tasks import Digits, digits

from lightning_spike.diagnosis.judgement import order_confirms, split_verdict
from lightning_spike.lab.experiments.sample_order import reshuffled
from lightning_spike.testing import ExtremeValues, SortedStretch

EPOCHS, LENGTH = 9, 24
AT = 256


def hardly_learnable():
    """Most labels are random, so that what helps is to guess the label that came most often of late."""
    images, labels = digits().tensors
    generator = torch.Generator().manual_seed(5)
    wrong = torch.rand(len(labels), generator=generator) < 0.6
    return TensorDataset(images, torch.where(wrong, torch.randint(10, (len(labels),), generator=generator), labels))


def test_a_sorted_stretch_is_ordinary_in_another_order(tmp_path):
    fault = SortedStretch(at=AT, strength=1.0, length=LENGTH)
    trainer = examined(lambda: Digits(0.01), tmp_path, fault, epochs=EPOCHS, dataset=hardly_learnable())
    found = measured(trainer).sample_order
    assert found.left < 2 / 3
    assert found.shuffled < found.loss
    assert order_confirms(found)


def test_a_stretch_of_extreme_samples_is_as_bad_in_any_order(tmp_path):
    trainer = examined(lambda: Digits(0.003), tmp_path, ExtremeValues(268, 12.0, length=6), epochs=EPOCHS)
    found = measured(trainer).sample_order
    assert found.left > 0.9
    assert order_confirms(found) is False


def test_a_single_bad_batch_is_no_stretch(tmp_path):
    trainer = examined(lambda: Digits(0.003), tmp_path, ExtremeValues(280, 12.0), epochs=EPOCHS)
    assert split_verdict(measured(trainer)) == "data"
    assert measured(trainer).sample_order is None


def test_dealt_out_anew_every_sample_is_there_once_in_batches_as_large_as_before():
    before = torch.get_rng_state()
    batches = [torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 10)]
    dealt = reshuffled([entry(k, batch) for k, batch in enumerate(batches)])
    assert [len(e.batch) for e in dealt] == [4, 4, 2]
    assert [e.at.ordinal for e in dealt] == [0, 1, 2]
    together = torch.cat([e.batch for e in dealt])
    assert sorted(together.tolist()) == list(range(10))
    assert together.tolist() != list(range(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_different_shapes_are_left_alone():
    assert reshuffled([entry(0, torch.zeros(4, 3)), entry(1, torch.zeros(4, 5))]) is None
