"""Batches that come again and again: told from new ones, from one repetition, and from alterations."""

import numpy as np
import pytest
from synthetic import Run, an_episode

from lightning_spike.diagnosis.observations.repeats import repeats
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import EpisodeKind, Recovery

ONSET = 200


def a_run(kinds=2, *, begin=100, altered=0, tremble=0.0):
    """From `begin` on the same `kinds` batches in turn.

    Of every 10, the last `altered` are changed, which makes their loss 5 times as high from the onset on.
    """
    run = Run(0, noise=0.0)
    rng = np.random.default_rng(1)
    run.loss[begin:] = 0.3
    for ordinal in range(begin, run.length):
        for series in (run.max_abs, run.std, run.mean):
            series[ordinal] = series[begin + (ordinal - begin) % kinds] * (1.0 + tremble * rng.standard_normal())
        if ordinal % 10 >= 10 - altered:
            run.std[ordinal] *= 1.0 + rng.random()
            run.loss[ordinal] *= 5.0 if ordinal >= ONSET else 1.0
    run.episodes = [an_episode(ONSET, 399, kind=EpisodeKind.OSCILLATION, before=0.3, recovery=Recovery.NEVER)]
    return run


def told(run, **options):
    store = run.store(**options)
    return repeats(EpisodeView(store, store.episodes[0]))


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_the_same_few_batches_are_counted(kinds):
    again = told(a_run(kinds))
    assert (again.kinds, again.came, again.window) == (kinds, 64, 64)
    assert again.known == pytest.approx(1.0)
    assert again.altered is None


def test_altered_batches_are_told_from_those_that_came_before():
    again = told(a_run(altered=5))
    # of the 64 batches from 136 on, those that end in 0 to 4 are as they were
    assert (again.kinds, again.came) == (2, sum(o % 10 < 5 for o in range(136, 200)))
    assert (again.known, again.altered) == (pytest.approx(1.0), pytest.approx(5.0))


@pytest.mark.parametrize("options", [{"kinds": 200}, {"kinds": 40}, {"altered": 8}, {"begin": 190}])
def test_new_batches_are_no_repetition(options):
    assert told(a_run(**options)) is None


def test_sums_in_another_order_make_no_other_batch():
    assert told(a_run(tremble=1e-7)) is not None
    assert told(a_run(tremble=1e-2)) is None


def test_without_values_nothing_is_said():
    assert told(a_run(), without=("batch/",)) is None
    run = a_run()
    run.std[:] = np.nan
    run.mean[::3] = np.inf
    run.loss[ONSET:] = np.nan
    again = told(run)
    assert again is None or again.known is None


def test_batches_of_which_nothing_telling_is_known_are_not_taken_for_the_same():
    run = a_run(kinds=200)
    assert told(run, without=tuple(f"batch/input/{name}" for name in ("mean", "std", "max_abs"))) is None
