"""A batch in which two samples are bad, and one that is bad as a whole: whether a few carry the excess."""

from lab.episodes import LATE, At, examined, measured
from training_tasks import Digits

from lightning_spike.diagnosis.judgement import split_verdict

BAD = [3, 7]


def digits():
    return Digits(0.003)


def two_samples(trainer, module, batch):
    batch[0][BAD] *= 30
    batch[1][BAD] = (batch[1][BAD] + 5) % 10


def all_labels(trainer, module, batch):
    batch[1].add_(5).remainder_(10)


def test_the_few_bad_samples_are_named_and_without_them_the_batch_is_ordinary(tmp_path):
    found = measured(examined(digits, tmp_path, At(LATE, start=two_samples))).sample_exchange
    assert list(found.positions) == BAD
    assert found.samples == 16
    assert found.without < 0.5 < found.loss
    assert found.left < 0.25


def test_a_batch_that_is_bad_as_a_whole_is_blamed_on_no_few(tmp_path):
    trainer = examined(digits, tmp_path, At(LATE, start=all_labels))
    assert split_verdict(measured(trainer)) == "data"
    assert measured(trainer).sample_exchange is None
