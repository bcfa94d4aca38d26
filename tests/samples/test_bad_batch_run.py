import math

import torch

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.sample_ids import LoaderIds, SampleIds
from lightning_spike.records import Moment
from lightning_spike.samples.bad_batch_run import GOOD_BATCHES, MAX_BATCHES, BadBatchRun
from lightning_spike.samples.examined_batch import ExaminedBatch
from lightning_spike.samples.suspect_samples import Suspect
from lightning_spike.signals.random_state import RandomState

SIZE = 16


def batch(ordinal: int, suspects: int, score: float = 9.0, *, known: bool = True) -> ExaminedBatch:
    """Its samples have the dataset indices 100 * ordinal, 100 * ordinal + 1, …; the last ones stand out."""
    ids = LoaderIds(loader="0", drawn=tuple(100 * ordinal + k for k in range(SIZE)), dataset=None)
    return ExaminedBatch(
        entry=RingEntry(
            at=Moment(ordinal=ordinal, step=ordinal + 7, epoch=0, batch_idx=ordinal),
            batch=torch.zeros(SIZE),
            ids=SampleIds(loaders=(ids,)) if known else None,
            rng=RandomState.take(),
        ),
        leaves=(),
        size=SIZE,
        values={},
        suspects=tuple(
            Suspect(position=SIZE - 1 - k, score=score, loss=1.0, max_abs=1.0, reasons=("why",))
            for k in range(suspects)
        ),
    )


def stretch(*suspects: int, **how) -> BadBatchRun:
    first, *others = (batch(ordinal, count, **how) for ordinal, count in enumerate(suspects))
    made = BadBatchRun(3, first)
    for one in others:
        made.add(one)
    return made


def test_ends_with_good_batches_and_leaves_them_out():
    found = stretch(5, 6, 1, 4, 0, 2)
    assert found.is_over
    detail = found.finding().detail
    assert (detail["episode"], detail["ordinals"], detail["last_step"], detail["count"]) == (3, [0, 1, 3], 10, 15)
    assert sorted(detail["dataset_indices"]) == [*range(11, 16), *range(110, 116), *range(312, 316)]
    assert "step 7 to 10" in detail["text"]


def test_goes_on_while_batches_are_bad():
    assert not stretch(5, *[8] * (MAX_BATCHES - 2)).is_over
    assert stretch(5, *[8] * (MAX_BATCHES - 1)).is_over
    assert not stretch(5, *[0] * (GOOD_BATCHES - 1)).is_over


def test_where_half_of_a_batch_stands_out_all_of_it_is_named():
    assert stretch(SIZE // 2).finding().detail["dataset_indices"] == list(range(SIZE))
    assert stretch(SIZE // 2 - 1).finding().detail["count"] == SIZE // 2 - 1


def test_one_sample_of_a_later_batch_counts_only_where_it_is_not_finite():
    assert stretch(1, 1).finding().detail["ordinals"] == [0]
    assert stretch(1, 1, score=math.inf).finding().detail["ordinals"] == [0, 1]


def test_a_batch_after_an_onset_dated_too_early_is_found():
    assert stretch(0, 8, 0, 0).finding().detail["ordinals"] == [1]


def test_nothing_bad_is_no_finding_and_unknown_indices_are_none():
    assert stretch(0, 1, 0).finding() is None
    detail = stretch(5, known=False).finding().detail
    assert (detail["dataset_indices"], detail["count"]) == ([], 5)
