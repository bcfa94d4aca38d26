"""`hard_sample_streak`: batches of one kind in a row, by class or by number."""

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, said_of

from lightning_spike.diagnosis.rank import diagnose


def sorted_stretch(length=12, onset=206, classes=True):
    run = Run(0, noise=0.05)
    rng = np.random.default_rng(0)
    stretch = slice(200, 200 + length)
    name = "entropy" if classes else "std"
    mixed = 2.0 + 0.05 * rng.standard_normal(run.length)
    mixed[stretch] = 0.4
    run.more[f"batch/target/{name}"] = mixed
    if classes:
        run.more["batch/target/longest_run"] = np.full(run.length, 3.0)
        run.more["batch/target/longest_run"][stretch] = 32.0
    else:
        run.more["batch/target/mean"] = 0.1 * rng.standard_normal(run.length)
        run.more["batch/target/mean"][stretch] = np.linspace(-3, 3, length)
    run.bump(onset, 6, 8)
    run.episodes = [an_episode(onset, onset + 2, onset + 20, height=run.loss[onset], before=0.35)]
    return run


def said(run, without=()):
    store = run.store(without=without)
    return said_of("hard_sample_streak", store, store.episodes[0])


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("onset", [203, 215, 235])
def test_it_comes_first_also_when_the_loss_rises_late(classes, onset):
    ranked = diagnose(sorted_stretch(onset=onset, classes=classes).store()).overall
    assert ranked[0].cause == "hard_sample_streak"
    assert ranked[0].probability > 0.5


def test_one_or_two_one_sided_batches_or_none_do_not_speak():
    for length in (0, 2):
        told = said(sorted_stretch(length=length))
        assert not told.supported
        assert told.total <= -3.0


def test_a_stretch_that_comes_after_the_trouble_has_not_made_it():
    assert not said(sorted_stretch(onset=185)).supported


def test_the_lab_can_confirm_and_refute_it():
    totals = []
    for left in (0.1, 0.95):
        run = sorted_stretch()
        run.note(LabResult("order", {"episode": 1, "left": left}))
        totals.append(said(run).total)
    assert totals[0] > said(sorted_stretch()).total > totals[1]


def test_the_fix_names_the_stretch():
    told = said(sorted_stretch())
    assert told.change.setting == "shuffle"
    assert "9 batches" in told.fixes[0] or "12 batches" in told.fixes[0]
    assert "from step 200" in told.fixes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signals_that_are_missing_or_not_finite_are_borne(bad):
    run = sorted_stretch()
    for series in run.more.values():
        series[:] = bad
    assert not said(run).supported
    assert not said(sorted_stretch(), without=("batch/",)).supported
