"""Ranks that have parted, as the exchange of checksums finds it; and runs in which there is nothing to part."""

import dataclasses

import numpy as np
import pytest
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding, LayerRow

KINDS = ("weights_differ", "gradient_differs")


def found(kind, at=200, **detail):
    own = {
        "parameters": ["net.0.weight"],
        "count": 6,
        "of": 6,
        "ranks": [1],
        "last_equal": 100,
        "text": f"It is {kind}.",
    }
    return Finding(detector="ranks", kind=kind, at=moment(at), detail=own | detail)


def a_run(*findings, world_size=2, onset=None):
    run = Run(0)
    run.facts = dataclasses.replace(run.facts, world_size=world_size)
    run.episodes = []
    if onset is not None:
        run.bump(onset, 9.0, 15)
        run.episodes = [an_episode(onset, onset, onset + 30, height=run.loss[onset], before=0.35)]
    run.note(*findings)
    return run


def examined(run):
    store = run.store()
    return said_of("distributed_desync", store, store.episodes[0])


@pytest.mark.parametrize("onset", [None, 150, 250])
@pytest.mark.parametrize(("kind", "place"), [(KINDS[0], "weights"), (KINDS[1], "all_reduce")])
def test_it_comes_first_whenever_the_ranks_may_have_parted_before(kind, place, onset):
    first = diagnose(a_run(found(kind), onset=onset).store()).overall[0]
    assert (first.cause, first.change) == ("distributed_desync", Change(setting="code", value=place))
    assert first.probability > 0.5
    assert "apart: 1" in first.summary
    assert "batch 100" in first.fixes[1]


def test_gradients_that_differ_are_the_cause_of_weights_that_do():
    verdict = diagnose(a_run(*map(found, KINDS)).store()).overall[0]
    assert verdict.change.value == "all_reduce"
    assert "no_sync" in verdict.fixes[0]


def test_an_episode_while_the_ranks_were_still_equal_is_none_of_it():
    assert not examined(a_run(found("weights_differ", at=300, last_equal=200), onset=150)).supported


def test_one_process_has_nothing_to_part_from():
    assert examined(a_run(world_size=1, onset=200)).total < -3.0
    assert diagnose(a_run(world_size=1).store()).overall == ()


def test_ranks_that_were_compared_and_equal_clear_it():
    def total(*looks):
        store = a_run(onset=200).store()
        store.layer_names["ranks/weights"] = ("a",)
        for at in looks:
            row = LayerRow(at=moment(at), signal="ranks/weights", values=np.zeros(1, dtype=np.float32))
            store.layers.setdefault("ranks/weights", []).append(row)
        return said_of("distributed_desync", store, store.episodes[0]).total

    assert total(100, 300) < -4.0 < total(100) < -1.0


def test_the_loss_of_one_rank_alone_says_little():
    assert 0.0 < examined(a_run(found("rank_outlier", rank=1), onset=200)).total < 1.0
    assert diagnose(a_run(found("rank_outlier", rank=1)).store()).overall == ()


def test_what_it_brings_about_ranks_below():
    run = a_run(found("weights_differ"), onset=200)
    write = Finding(
        detector="outside_writes", kind="weights", at=moment(199), detail={"names": ["a"], "text": "Written."}
    )
    run.note(write)
    run.bump_gradient(195, 30.0, 20)
    told = [v.cause for v in diagnose(run.store()).overall]
    assert told[0] == "distributed_desync"


@pytest.mark.parametrize("value", [None, np.nan, np.inf, "x"])
@pytest.mark.parametrize("kind", [*KINDS, "counters_differ", "rank_outlier"])
def test_bears_missing_and_broken_values(kind, value):
    broken = found(kind, ranks=value, last_equal=value, count=value, text=value)
    run = a_run(broken, onset=200)
    run.grad[100:] = np.nan
    examination = examined(run)
    assert np.isfinite(examination.total)
    assert examination.supported
