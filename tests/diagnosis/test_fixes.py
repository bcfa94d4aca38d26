"""Values of remedies, against what follows from how the run was made."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.fixes import dataset_fix, lower_peak, sound_rate
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Episode, EpisodeKind, Finding, Recovery

ONSET = 300


def case(run: Run, *, recovery=Recovery.NEVER, end=None) -> EpisodeView:
    episode = Episode(
        id=1,
        kind=EpisodeKind.SPIKE,
        onset=moment(ONSET),
        noticed=moment(ONSET),
        peak=moment(ONSET + 2),
        end=None if end is None else moment(end),
        loss_before=0.3,
        loss_peak=5.0,
        recovery=recovery,
    )
    run.episodes = [episode]
    return EpisodeView(run.store(), episode)


def steps_of(run: Run, share, every=10) -> None:
    """Updates change the weights by this share of their size for a rate of 1."""
    measured = np.arange(run.length) % every == 0
    run.more["weight_norm"] = np.where(measured, 20.0, np.nan)
    run.more["update_norm"] = np.where(measured, 20.0 * share * run.rate, np.nan)


def test_a_rate_that_was_too_high_from_the_start_is_set_by_the_length_of_its_updates():
    run = Run()
    run.rate[:] = 0.5
    steps_of(run, 0.8)  # at 0.5 an update changes the weights by 40 %
    value, why = lower_peak(case(run), run.rate_signal, 0.5)
    assert value == pytest.approx(0.01 / 0.8, rel=0.05)
    assert "0.4 times their size" in why


def test_updates_of_the_trouble_itself_are_no_measure():
    run = Run()
    run.rate[:] = 0.5
    steps_of(run, 0.8)
    run.more["update_norm"][ONSET:] *= 1e6
    assert sound_rate(case(run), run.rate_signal) == pytest.approx(0.01 / 0.8)


def test_a_rate_borne_before_is_taken_unless_its_updates_were_far_too_long():
    run = Run()
    run.rate[ONSET - 1 :] = 0.5
    steps_of(run, 0.8)
    value, why = lower_peak(case(run), run.rate_signal, 0.5)
    assert (value, "stayed in its range" in why) == (0.01, True)
    steps_of(run, 80.0)  # at 0.01 they were 80 % of the weights
    assert lower_peak(case(run), run.rate_signal, 0.5)[0] == pytest.approx(0.01 / 80.0, rel=0.05)


def test_a_rate_that_climbed_goes_back_to_the_usual_one():
    run = Run()
    climb = np.arange(ONSET - 200, run.length)
    run.rate[climb] *= 30.0 ** np.minimum((climb - climb[0]) / 200, 1.0)
    run.rate[: ONSET - 200] = 0.01
    usual = float(np.median(run.rate[: ONSET - 64]))
    value, why = lower_peak(case(run), run.rate_signal, float(run.rate[ONSET - 1]))
    assert value == pytest.approx(usual, rel=0.1)
    assert "usual rate before it climbed" in why


def test_a_peak_that_was_never_seen_goes_back_to_what_was_borne_however_high_the_loss_then():
    run = Run()
    run.rate = np.where(np.arange(run.length) < 100, 0.01, 0.0005)
    run.rate[250:] = 0.5
    steps_of(run, 0.8)
    assert lower_peak(case(run), run.rate_signal, 0.5, since=250)[0] == 0.01
    run.rate[:100] = 0.4  # as high as the peak, so that the level of the loss counts
    run.more = {}
    assert lower_peak(case(run), run.rate_signal, 0.5, since=250)[0] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("recovery", "end", "repaired", "cut"),
    [(Recovery.NEVER, None, None, 10), (Recovery.WHOLE, 320, None, 3), (Recovery.WHOLE, 320, 0.9, 10)],
)
def test_where_nothing_shows_the_limit_the_cut_is_deep_only_with_reason(recovery, end, repaired, cut):
    run = Run()
    run.rate[:] = 0.5
    if repaired is not None:
        tried = ({"remedy": "lower_rate", "value": 0.1, "repaired": repaired},)
        run.note(LabResult("remedies", {"episode": 1, "tried": tried}))
    assert lower_peak(case(run, recovery=recovery, end=end), run.rate_signal, 0.5)[0] == pytest.approx(
        0.5 / cut, rel=0.05
    )


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_lengths_that_are_no_numbers_are_passed_over(broken):
    run = Run()
    run.rate[:] = 0.5
    steps_of(run, 0.8)
    run.more["weight_norm"][:] = broken
    assert sound_rate(case(run), run.rate_signal) is None


def test_all_samples_of_a_stretch_are_dropped_and_its_steps_named():
    run = Run()
    indices = [*range(100, 132), *range(500, 532)]
    detail = {"episode": 1, "ordinals": [ONSET, ONSET + 1], "last_step": ONSET + 1, "dataset_indices": indices}
    run.note(Finding(detector="batch", kind="suspect_batches", at=moment(ONSET), detail=detail))
    told = case(run)
    fix = dataset_fix(told)
    assert fix.change.value == tuple(indices)
    text = fix.text
    assert "100-131, 500-531" in text
    assert "2 bad batches from step 300 to 301" in text


def test_a_peak_that_no_warm_up_makes_good_is_lowered_first():
    run = Run()
    run.rate[:] = 0.5
    early = dataclasses.replace(case(run).episode, onset=moment(12), noticed=moment(12), peak=moment(14))
    for share, change in ((0.1, ("warmup_steps", 80.0)), (0.8, (run.rate_signal, 0.12))):
        steps_of(run, share)  # 5 and 40 % of the weights
        run.episodes = [early]
        found = said_of("warmup_too_short", run.store(), early)
        assert (found.change.setting, found.change.value) == change
        assert f"{change[1]:g}" in found.fixes[0]


def test_a_peak_that_an_earlier_cycle_bore_is_cut_by_three_however_long_its_updates_were():
    """Long updates of the first cycle did no harm: the loss fell through it."""
    run = Run(length=400)
    run.restarts(200, peak=0.65, low=1e-4)
    every = np.where(np.arange(400) % 10 == 0, 1.0, np.nan)
    run.more = {"weight_norm": 10.0 * every, "update_norm": 10.0 * 0.3 * run.rate * every}
    run.episodes = [an_episode(202, 204, 240)]
    store = run.store()
    case = EpisodeView(store, store.episodes[0])
    assert lower_peak(case, run.rate_signal, 0.65)[0] == pytest.approx(0.22)
    run.loss[:150] = 0.1
    store = run.store()
    assert lower_peak(EpisodeView(store, store.episodes[0]), run.rate_signal, 0.65)[0] < 0.1
