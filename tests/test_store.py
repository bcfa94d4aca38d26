import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spike.records import Episode, EpisodeKind, Finding, LayerRow, Moment, RunFacts, StepRow
from lightning_spike.store import History, TrainerStateStore


def moment(ordinal: int) -> Moment:
    return Moment(ordinal=ordinal, step=ordinal // 2, epoch=ordinal // 100, batch_idx=ordinal % 100)


def row(ordinal: int, **values: float) -> StepRow:
    return StepRow(at=moment(ordinal), values=values)


def filled(count: int, capacity: int = 256) -> History:
    history = History(capacity)
    for i in range(count):
        history.append(row(i, loss=float(i)))
    return history


def test_rows_come_back_as_they_went_in():
    history = filled(100)
    assert history.series("loss").tolist() == list(range(100))
    assert history.moment(41) == moment(41)
    assert history.at("loss", 41) == 41
    assert history.at("loss", 100) is None
    assert history.at("other", 41) is None


def test_a_nan_value_is_told_from_a_missing_one():
    history = History(64)
    history.append(row(0, loss=math.nan))
    history.append(row(1, grad_norm=2.0))
    assert math.isnan(history.at("loss", 0))
    assert history.at("loss", 1) is None
    assert history.present("loss").tolist() == [True, False]
    assert history.present("nothing").tolist() == [False, False]


def test_before_gives_only_finite_values_before_the_ordinal():
    history = History(64)
    for i, value in enumerate([1.0, math.nan, 2.0, math.inf, 3.0, 4.0]):
        history.append(row(i, loss=value))
    assert history.before("loss", 5, 2).tolist() == [2.0, 3.0]
    assert history.before("loss", 5, 99).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("count", [1000, 20_000])
def test_memory_is_bounded_and_the_recent_half_is_whole(count):
    history = filled(count)
    assert len(history) <= 256
    ordinals = history.ordinals
    assert ordinals[-1] == count - 1
    assert np.all(np.diff(ordinals[-100:]) == 1)
    assert ordinals[0] == 0


def test_the_far_past_is_evenly_thinned():
    ordinals = filled(50_000, 1024).ordinals
    old = ordinals[ordinals < 40_000]
    assert len(old) > 50
    assert np.diff(old).max() <= 4 * np.median(np.diff(old))


def test_marked_stretches_survive():
    history = History(256)
    for i in range(5000):
        history.append(row(i, loss=1.0))
        if i == 300:
            history.keep(280, 300)
    assert set(range(280, 301)) <= set(history.ordinals.tolist())


def test_marks_do_not_make_memory_grow():
    history = History(256)
    for i in range(3000):
        history.append(row(i, loss=1.0))
        history.keep(i - 100, i)
    assert len(history) <= 256


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300))
def test_any_values_are_taken(values):
    history = History(64)
    for i, value in enumerate(values):
        history.append(row(i, loss=value))
    kept = history.series("loss")
    for ordinal, value in zip(history.ordinals, kept, strict=True):
        assert value == values[ordinal] or (math.isnan(value) and math.isnan(values[ordinal]))


def episode(**changes: object) -> Episode:
    values = {"id": 1, "kind": EpisodeKind.SPIKE, "onset": moment(5), "noticed": moment(6), "peak": moment(5)}
    return Episode(**(values | changes))


def test_an_episode_is_replaced_by_its_newer_version():
    store = TrainerStateStore(RunFacts(started="now"))
    store.replace_episode(episode(id=2, onset=moment(50), noticed=moment(50)))
    store.replace_episode(episode())
    store.replace_episode(episode(loss_peak=4.0))
    assert [(e.id, e.loss_peak) for e in store.episodes] == [(1, 4.0), (2, None)]


def test_notes_go_where_they_belong_and_remarks_are_kept_once():
    store = TrainerStateStore(RunFacts(started="now"))
    store.note("seen", "seen", Finding(detector="d", kind="k", at=moment(1)))
    assert store.remarks == ["seen"]
    assert [f.kind for f in store.findings] == ["k"]


def test_findings_are_bounded_and_keep_the_first_and_the_last():
    store = TrainerStateStore(RunFacts(started="now"))
    for i in range(3000):
        store.note(Finding(detector="d", kind=str(i), at=moment(i)))
    assert len(store.findings) == 1000
    assert (store.findings[0].kind, store.findings[-1].kind) == ("0", "2999")


def test_layer_rows_between():
    store = TrainerStateStore(RunFacts(started="now"))
    for i in range(10):
        store.append(row(i), [LayerRow(at=moment(i), signal="grad_norm", values=np.ones(3, dtype=np.float32))])
    assert [r.at.ordinal for r in store.layer_rows("grad_norm", 3, 5)] == [3, 4, 5]
    assert store.layer_rows("other", 0, 9) == []


def test_a_trainer_without_a_store_says_so():
    class Bare: ...

    with pytest.raises(LookupError, match="no store"):
        TrainerStateStore.of(Bare())
