"""`data_drift`: inputs that move away and stay, against one odd batch and a stretch that came sorted."""

import numpy as np
import pytest
from synthetic import Run, an_episode, said_of

from lightning_spike.diagnosis.causes.data_drift import CAUSE
from lightning_spike.diagnosis.rank import diagnose


def drift(onset=206, begin=200, by=2.0, length=None):
    run = Run(0, noise=0.05)
    move = by * np.clip((np.arange(run.length) - begin) / 40, 0.0, 1.0)
    if length is not None:
        move[begin + length :] = 0.0
    run.mean = run.mean + move
    run.std = run.std * (1 + 0.5 * np.abs(move))
    run.max_abs = run.max_abs * (1 + 0.5 * np.abs(move))
    run.more["batch/input/drift"] = np.r_[np.full(64, np.nan), np.ones(run.length - 64)] + 20 * np.abs(move)
    run.bump(onset, 5, 60)
    run.episodes = [an_episode(onset, onset + 10, onset + 80, height=run.loss[onset], before=0.35)]
    return run


def said(run, without=()):
    store = run.store(without=without)
    return said_of("data_drift", store, store.episodes[0])


@pytest.mark.parametrize("by", [2.0, -2.0])
@pytest.mark.parametrize("onset", [202, 206, 225])
def test_it_comes_first_and_the_batch_below(by, onset):
    ranked = {v.cause: v.probability for v in diagnose(drift(onset, by=by).store()).overall}
    assert next(iter(ranked)) == "data_drift"
    assert ranked["data_drift"] > 0.7
    assert ranked.get("bad_batch", 0.0) < 0.1


def test_inputs_as_ever_and_a_single_odd_batch_speak_against_it():
    assert said(drift(by=0.0)).total < -3.0
    run = drift(by=0.0)
    run.odd_batch(206, 40)
    assert said(run).total < -3.0
    assert not said(run).supported


def test_what_moved_only_long_after_the_trouble_has_not_made_it():
    run = drift(begin=260)
    assert not said(run, without=("batch/input/drift",)).supported


def test_a_stretch_that_came_sorted_is_no_drift():
    run = drift(length=30)
    run.more["batch/target/std"] = np.r_[np.ones(200) + 0.01 * np.arange(200) / 200, np.full(30, 0.1), np.ones(170)]
    assert said(run).total < said(drift(length=30)).total - 2.0


def test_tokens_move_by_their_moving_average_alone():
    told = said(drift(), without=("batch/input/mean", "batch/input/std", "batch/input/max_abs"))
    assert told.total > 3.0
    assert told.change.setting == "normalisation"


def test_the_fix_gives_the_range_of_before():
    run = drift()
    assert said(run).change.setting in {"input_limit", "normalisation"}
    low, high = run.mean[24:152].min(), run.mean[24:152].max()
    mean_only = said(run, without=("batch/input/std", "batch/input/max_abs"))
    assert f"{low:.3g} to {high:.3g}" in mean_only.fixes[0] or "batch" in mean_only.fixes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signals_that_are_missing_or_not_finite_are_borne(bad):
    run = drift()
    for series in (run.mean, run.std, run.max_abs, run.more["batch/input/drift"]):
        series[:] = bad
    assert not said(run).supported
    assert not said(drift(), without=("batch/",)).supported


def without_episode(*, fall=0.0, rise=1.0, back=None):
    """Inputs move from batch 200 on.

    The loss falls at `fall` a batch throughout and is multiplied by `rise` from batch 230 on.
    """
    run = drift(length=back)
    steps = np.arange(run.length)
    run.loss = 0.4 * np.exp(0.2 * np.random.default_rng(1).standard_normal(run.length) - fall * steps)
    run.loss[230:] *= rise
    run.episodes = []
    return run


@pytest.mark.parametrize(
    "options",
    [{"rise": 1.6}, {"rise": 1.6, "fall": 0.001}, {}],
    ids=["it rose", "it rose and fell on", "it stopped falling"],
)
def test_a_run_without_an_episode_is_told_of_where_the_loss_shows_something(options):
    first = diagnose(without_episode(**options).store()).overall[0]
    assert first.cause == "data_drift"


@pytest.mark.parametrize(
    "options", [{"fall": 0.004}, {"rise": 1.6, "back": 30}], ids=["a loss that falls on", "inputs that came back"]
)
def test_and_not_of_where_it_shows_nothing(options):
    assert CAUSE.shown(without_episode(**options).store()) is None
