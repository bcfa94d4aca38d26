import math

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import EpisodeKind, StepRow
from lightning_spike.store import TrainerStateStore


def case_of(run, episode):
    run.episodes = [episode]
    return EpisodeView(run.store(), episode)


def test_an_excess_is_measured_against_the_healthy_values_before():
    run = Run(0)
    run.grad[200] = 8.0
    excess = case_of(run, an_episode(200, 200, 210)).excess("grad_norm", 200)
    healthy = np.log(run.grad[64:192])
    assert excess.expected == pytest.approx(np.median(run.grad[128:192]), rel=1e-6)
    assert excess.ratio == pytest.approx(8.0 / excess.expected)
    assert excess.above
    assert excess.z == pytest.approx((math.log(8.0) - healthy.mean()) / healthy.std(), rel=0.6)


def test_values_inside_episodes_and_just_before_the_onset_are_not_healthy():
    run = Run(0)
    run.grad[120:140] = 500.0
    run.grad[195:] = 700.0
    first, second = an_episode(120, 125, 139), an_episode(200, 200, 210, id=2)
    run.episodes = [first, second]
    assert EpisodeView(run.store(), second).before("grad_norm", 128).max() < 10.0


def test_a_healthy_value_is_not_odd():
    for seed in range(5):
        case = case_of(Run(seed), an_episode(200, 200, 210))
        assert not case.excess("grad_norm", 200).odd
        assert case.oddities(200) == ()


@pytest.mark.parametrize(("series", "factor"), [("max_abs", 30.0), ("std", 30.0), ("std", 0.001)])
def test_an_odd_batch_is_seen_with_its_leaf_and_statistic(series, factor):
    run = Run(0)
    getattr(run, series)[200] *= factor
    odd = case_of(run, an_episode(200, 200, 210)).oddities(200)
    assert [(o.leaf, o.statistic, o.signal) for o in odd] == [("input", series, f"batch/input/{series}")]


def test_a_shifted_mean_is_told_in_spreads():
    run = Run(0)
    run.mean[200] = 4.0
    odd = case_of(run, an_episode(200, 200, 210)).oddities(200)
    assert odd[0].statistic == "mean"
    assert odd[0].excess.ratio == pytest.approx(1.0 + 4.0, rel=0.1)


def test_a_short_last_batch_is_allowed_its_noise():
    loud, scores = Run(0), []
    loud.grad[200] = 2.5
    for size in (32, 2):
        store = TrainerStateStore(loud.facts)
        for ordinal in range(220):
            row = loud.row(ordinal)
            store.append(
                StepRow(at=row.at, values=row.values, batch_size=size if ordinal == 200 else 32, usual_batch_size=32)
            )
        scores.append(EpisodeView(store, an_episode(200, 200, 201)).excess("grad_norm", 200).z)
    assert scores[1] == pytest.approx(scores[0] / 4.0)


def test_few_values_before_ask_for_a_large_factor():
    run = Run(0)
    run.grad[6], run.grad[7] = 4.0, 40.0
    case = case_of(run, an_episode(6, 6, 8))
    assert not case.excess("grad_norm", 6).above
    assert case.excess("grad_norm", 7).above
    assert case_of(run, an_episode(2, 2, 3)).excess("grad_norm", 2) is None


def test_not_finite_is_as_far_out_as_can_be():
    run = Run(0)
    run.grad[200] = math.nan
    excess = case_of(run, an_episode(200, 200, 210)).excess("grad_norm", 200)
    assert excess.above
    assert excess.z == math.inf


def test_a_rate_is_that_of_the_last_update_before_the_onset():
    run = Run(0)
    run.rate[200:] = 0.5
    store = TrainerStateStore(run.facts)
    for ordinal in range(220):
        values = dict(run.row(ordinal).values)
        if ordinal % 4 != 3:  # four batches an update
            del values["lr-AdamW"]
        store.append(StepRow(at=moment(ordinal), values=values))
    assert EpisodeView(store, an_episode(203, 203, 210)).rate("lr-AdamW") == 0.01
    assert EpisodeView(store, an_episode(204, 204, 210)).rate("lr-AdamW") == 0.5


def test_the_bearable_rate_is_one_used_at_the_same_level_of_the_loss():
    run = Run(0)
    run.rate = np.where(np.arange(400) < 60, 0.2, np.where(np.arange(400) < 200, 0.02, 0.5))
    case = case_of(run, an_episode(201, 201, 230, before=0.4))
    assert case.tolerated_rate("lr-AdamW", 0.5) == 0.02


def test_sudden_means_that_the_first_batch_made_most_of_the_rise():
    run = Run(0)
    run.loss[200:203] = [4.0, 4.2, 4.0]
    run.loss[300:303] = [0.45, 1.5, 6.0]
    assert case_of(run, an_episode(200, 201, 203, before=0.3, height=4.2)).sudden is True
    assert case_of(run, an_episode(300, 302, 303, before=0.3, height=6.0)).sudden is False
    assert case_of(run, an_episode(300, 302, 303, before=None)).sudden is None


def test_findings_are_of_this_episode_and_the_newest_counts():
    run = Run(0)
    run.lab_split("weights", episode=2)
    run.lab_split("noise")
    run.lab_split("data")
    assert case_of(run, an_episode(200, 200, 210)).split == "data"


def test_what_follows_on_another_episode_knows_it():
    run = Run(0)
    shock, after, later = an_episode(100, 100, 110), an_episode(120, 120, 125, id=2), an_episode(300, 300, 310, id=3)
    run.episodes = [shock, after, later]
    store = run.store()
    assert EpisodeView(store, after).previous == shock
    assert EpisodeView(store, later).previous is None
    assert EpisodeView(store, shock).previous is None


def test_the_loss_is_told_in_words_even_where_it_is_no_number():
    run = Run(0)
    assert case_of(run, an_episode(200, 200, 210)).loss_text == "the loss went from 0.3 to 4"
    nan = an_episode(200, kind=EpisodeKind.NONFINITE, height=math.nan)
    assert case_of(run, nan).loss_text == "the loss became NaN (before: 0.3)"


def test_experiments_on_another_episode_are_not_its_own():
    run = Run(0)
    run.note(LabResult("split", {"episode": 2, "verdict": "data"}))
    assert case_of(run, an_episode(200, 200, 210)).split is None
