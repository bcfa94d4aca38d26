"""`sample_weight_blowup`: weights that double and double again, against weights that stay and batches that are odd."""

import numpy as np
import pytest
from synthetic import SGD, Run, an_episode, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import EpisodeKind


def pile_up(seed=0, onset=210, factor=1.25):
    """Weights of a quarter of the samples grow by a quarter from batch 200 on."""
    run = Run(seed, optimizer=SGD)
    rng = np.random.default_rng(seed)
    grown = factor ** np.clip(np.arange(run.length) - 199, 0, 30)
    run.more["batch/weight/max_abs"] = (1.4 + 0.1 * rng.random(run.length)) * grown
    run.more["batch/weight/std"] = 0.3 * grown
    run.more["batch/weight/mean"] = 1.0 * grown
    run.more["batch/weight/ess"] = 0.9 + 0.02 * rng.random(run.length) - 0.6 * (grown > 2.0)
    run.bump(onset, 12, 20)
    run.bump_gradient(onset, 10, 20)
    run.episodes = [an_episode(onset, onset + 1, onset + 30, height=run.loss[onset], before=0.35)]
    return run


def said(run, without=()):
    store = run.store(without=without)
    return said_of("sample_weight_blowup", store, store.episodes[0])


def test_it_comes_first_and_stands_above_the_batch_and_the_gradient():
    ranked = {v.cause: v.probability for v in diagnose(pile_up().store()).overall}
    assert next(iter(ranked)) == "sample_weight_blowup"
    assert ranked["sample_weight_blowup"] > 0.7


@pytest.mark.parametrize("onset", [203, 210, 240])
def test_growth_that_began_long_before_the_loss_rose_is_seen_too(onset):
    assert said(pile_up(onset=onset)).total > 3.0


def test_the_cap_is_half_above_the_usual_largest_weight():
    told = said(pile_up())
    assert told.change.setting == "sample_weight_limit"
    assert told.change.value == pytest.approx(1.5 * 1.45, rel=0.03)
    assert f"{told.change.value:g}" in told.fixes[0]


def test_weights_as_ever_or_none_at_all_speak_against_it():
    assert said(pile_up(factor=1.0)).total < -3.0
    assert said(pile_up(), without=("batch/weight",)).total < -3.0
    assert not said(pile_up(), without=("batch/weight",)).supported


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signals_that_are_missing_or_not_finite_are_borne(bad):
    run = pile_up()
    for series in run.more.values():
        series[::3] = bad
    assert said(run).total > 3.0
    for series in run.more.values():
        series[:] = bad
    assert said(run).total < 0.0


def test_one_odd_batch_leaves_the_weights_out_of_it():
    run = pile_up(factor=1.0)
    run.odd_batch(210, 40)
    ranked = diagnose(run.store()).overall
    assert ranked[0].cause == "bad_batch"
    assert "sample_weight_blowup" not in {v.cause for v in ranked}


def test_a_slow_rise_that_is_dated_back_to_the_first_larger_weight_is_its_doing():
    run = pile_up(factor=1.14)
    run.episodes = [an_episode(198, 260, None, kind=EpisodeKind.DIVERGENCE, height=9.0, before=0.35)]
    assert said(run).total > 3.0
    run.episodes = [an_episode(180, 260, None, kind=EpisodeKind.DIVERGENCE, height=9.0, before=0.35)]
    assert said(run).total < -3.0
