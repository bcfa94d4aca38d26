"""Episodes: what is seen, when, as what; what is not; and that neither a cut nor any float changes it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.records import EpisodeKind, Moment, Recovery, StepRow, ValidationPoint

LENGTH = 1000
AT = 700


def row(step, value, signal="loss", **sizes):
    values = dict(value) if isinstance(value, dict) else {signal: value}
    return StepRow(at=Moment(ordinal=step, step=step, epoch=step // 100, batch_idx=step % 100), values=values, **sizes)


def watched(losses):
    detector = EpisodeDetector()
    for step, loss in enumerate(losses):
        detector.observe(row(step, float(loss)))
    detector.finish()
    return detector


def healthy(seed, sigma=0.03, length=LENGTH):
    steps = np.arange(length)
    return (2.0 + 6.0 * np.exp(-steps / 120.0)) * (1.0 + sigma * np.random.default_rng(seed).normal(size=length))


def only(detector):
    (episode,) = detector.episodes
    return episode


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_episode(seed):
    detector = watched(healthy(seed))
    assert detector.episodes == ()
    assert detector.healthy


@pytest.mark.parametrize("noise", ["lognormal", "t3", "negative", "near zero"])
def test_heavy_tails_negative_and_vanishing_losses_are_healthy(noise):
    rng = np.random.default_rng(17)
    steps = np.arange(1500)
    streams = {
        "lognormal": 2.0 * rng.lognormal(0.0, 0.6, 1500),
        "t3": 2.3 + 0.05 * rng.standard_t(3, 1500),
        "negative": 3.0 - 6.0 * (1.0 - np.exp(-steps / 200.0)) + 0.1 * rng.normal(size=1500),
        "near zero": np.exp(-steps / 60.0) * rng.lognormal(0.0, 0.4, 1500),
    }
    assert len(watched(streams[noise]).episodes) <= 1


def test_a_spike_is_named_dated_and_over():
    losses = healthy(1)
    losses[AT : AT + 3] *= 3.0
    episode = only(watched(losses))
    assert (episode.kind, episode.recovery) == (EpisodeKind.SPIKE, Recovery.WHOLE)
    assert (episode.onset.ordinal, episode.noticed.ordinal) == (AT, AT)
    assert episode.end is not None
    assert episode.end.ordinal == AT + 2
    assert AT <= episode.peak.ordinal <= AT + 2
    assert episode.loss_before == pytest.approx(2.0, rel=0.05)
    assert episode.loss_peak == pytest.approx(max(losses[AT : AT + 3]))
    assert 10.0 < episode.severity <= 99.0


def test_a_spike_at_step_40_is_seen():
    losses = healthy(2)
    losses[40] *= 5.0
    assert only(watched(losses)).onset.ordinal == 40


def test_a_spike_does_not_hide_the_next_one():
    losses = healthy(3)
    losses[AT] *= 50.0
    losses[AT + 30] *= 2.0
    assert [episode.onset.ordinal for episode in watched(losses).episodes] == [AT, AT + 30]


def test_a_nan_is_seen_and_hides_nothing():
    losses = healthy(4)
    losses[AT] = math.nan
    losses[AT + 30] *= 2.5
    first, second = watched(losses).episodes
    assert (first.kind, second.kind) == (EpisodeKind.NONFINITE, EpisodeKind.SPIKE)
    assert math.isnan(first.loss_peak)
    assert (first.onset.ordinal, second.onset.ordinal) == (AT, AT + 30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_is_seen_from_the_first_batch_on(value):
    assert only(watched([value, *healthy(5, length=100)])).kind is EpisodeKind.NONFINITE


def test_nan_to_the_end_is_one_episode_without_an_end():
    losses = healthy(6)
    losses[AT:] = math.nan
    episode = only(watched(losses))
    assert (episode.kind, episode.end, episode.recovery) == (EpisodeKind.NONFINITE, None, Recovery.NEVER)


def test_slow_divergence_is_dated_to_where_it_began():
    losses = healthy(7) * np.minimum(5.0, 1.02 ** np.maximum(0, np.arange(LENGTH) - AT))
    episode = only(watched(losses))
    assert (episode.kind, episode.end, episode.recovery) == (EpisodeKind.DIVERGENCE, None, Recovery.NEVER)
    assert abs(episode.onset.ordinal - AT) <= 12


def test_a_level_that_stays_is_taken_up_and_the_next_spike_on_it_is_seen():
    losses = healthy(8, length=1600)
    losses[AT:] *= 1.6
    losses[1500] *= 3.0
    first, second = watched(losses).episodes
    assert (first.kind, first.recovery, first.onset.ordinal) == (EpisodeKind.DIVERGENCE, Recovery.NEVER, AT)
    assert (second.kind, second.onset.ordinal) == (EpisodeKind.SPIKE, 1500)


@pytest.mark.parametrize("seed", range(5))
def test_losses_that_are_raised_together_are_seen_though_each_may_be_in_its_range(seed):
    losses = 2.0 * np.random.default_rng([31, seed]).lognormal(0.0, 0.15, LENGTH)
    losses[AT : AT + 12] *= 1.6  # some three standard deviations each
    episodes = watched(losses).episodes
    assert any(AT - 4 <= episode.onset.ordinal < AT + 12 for episode in episodes)


def test_a_bump_within_the_noise_at_every_warm_restart_is_none():
    found = 0
    for seed in range(5):
        since = np.arange(LENGTH) % 250
        bump = np.where(np.arange(LENGTH) < 250, 0.0, 0.06 * (1.0 - np.exp(-since / 10.0)) * np.exp(-since / 60.0))
        noise = np.random.default_rng([32, seed]).normal(0.0, 0.05, LENGTH)
        found += len(watched(healthy(0, sigma=0.0) * (1.0 + bump) + noise).episodes)
    assert found <= 1


def test_a_spike_that_decays_slowly_is_one_spike():
    since = np.maximum(0, np.arange(LENGTH) - AT)
    losses = healthy(9) * (1.0 + np.where(np.arange(LENGTH) >= AT, 2.0 * np.exp(-since / 40.0), 0.0))
    episode = only(watched(losses))
    assert (episode.kind, episode.recovery, episode.onset.ordinal) == (EpisodeKind.SPIKE, Recovery.WHOLE, AT)


@pytest.mark.parametrize("period", [2, 5, 12, 20])
def test_swings_are_told_from_spikes(period):
    since = np.arange(LENGTH) - AT
    losses = healthy(10) * (1.0 + np.where(since >= 0, 0.35 * np.cos(2.0 * np.pi * since / period), 0.0))
    episode = only(watched(losses))
    assert episode.kind is EpisodeKind.OSCILLATION
    assert abs(episode.onset.ordinal - AT) <= 8


def test_a_fall_that_breaks_off_is_a_stall_and_a_smooth_end_is_none():
    losses = healthy(11, sigma=0.01)
    losses[250:] *= losses[240:250].mean() / (2.0 + 6.0 * np.exp(-np.arange(250, LENGTH) / 120.0))
    episode = only(watched(losses))
    assert (episode.kind, episode.recovery) == (EpisodeKind.STALL, Recovery.NEVER)
    assert abs(episode.onset.ordinal - 250) <= 40


def test_a_loss_that_never_moves_has_stalled():
    episode = only(watched([2.302585] * 300))
    assert (episode.kind, episode.onset.ordinal) == (EpisodeKind.STALL, 0)


@pytest.mark.parametrize("period", [10, 97])
def test_spikes_in_step_are_one_family(period):
    losses = healthy(12)
    losses[300::period] *= 3.0
    episodes = watched(losses).episodes
    assert {episode.kind for episode in episodes} == {EpisodeKind.SPIKE}
    assert {episode.period for episode in episodes} == {period}


def test_a_short_last_batch_is_noisier_and_healthy():
    rng = np.random.default_rng(21)
    detector = EpisodeDetector()
    for step in range(2000):
        size = 1 if step % 50 == 49 else 64
        loss = 2.3 + 0.8 * rng.normal() / math.sqrt(size)
        detector.observe(row(step, loss, batch_size=size, usual_batch_size=64))
    assert detector.episodes == ()


def test_a_batch_without_a_loss_is_passed_over():
    detector = EpisodeDetector()
    for step, loss in enumerate(healthy(13)):
        detector.observe(row(step, {} if step % 3 else {"loss": float(loss), "grad_norm": math.nan}))
    assert detector.episodes == ()


def test_several_losses_are_judged_each_and_one_trouble_is_one_episode():
    detector = EpisodeDetector()
    rng = np.random.default_rng(22)
    for step in range(600):
        values = {"loss/generator": 1.0 + 0.02 * rng.normal(), "loss/critic": 3.0 + 0.02 * rng.normal()}
        if step == 400:
            values = {name: 4.0 * value for name, value in values.items()}
        if step == 500:
            values["loss/critic"] *= 3.0
        detector.observe(row(step, values))
    assert [(e.onset.ordinal, e.signal) for e in detector.episodes] == [(400, "loss/generator"), (500, "loss/critic")]


def test_validation_losses_alone_are_judged():
    detector = EpisodeDetector()
    for place, value in enumerate([*healthy(14, length=200), 50.0, *[2.0] * 5]):
        detector.observe_validation(ValidationPoint(at=row(place, 0.0).at, metric="val_loss", value=float(value)))
    assert [(e.onset.ordinal, e.signal) for e in detector.episodes] == [(200, "val_loss")]


def test_an_overfit_becomes_an_episode_that_begins_at_the_best_validation():
    detector = EpisodeDetector()
    for place in range(30):
        value = 1.0 + 0.03 * abs(place - 12)
        point = ValidationPoint(
            at=row(place * 10, 0.0).at, metric="val_loss", value=value, train_loss=1.0 - 0.02 * place
        )
        detector.observe(row(place * 10, 1.0 - 0.02 * place))
        detector.observe_validation(point)
    overfit = [episode for episode in detector.episodes if episode.kind is EpisodeKind.OVERFIT]
    assert [(e.onset.ordinal, e.signal, e.end) for e in overfit] == [(120, "val_loss", None)]
    assert overfit[0].noticed.ordinal > 120


def test_healthy_says_whether_a_snapshot_may_be_trusted():
    detector = EpisodeDetector()
    losses = healthy(15)
    losses[AT] = math.nan
    states = []
    for step, loss in enumerate(losses):
        detector.observe(row(step, float(loss)))
        states.append(detector.healthy)
    assert states[AT - 1]
    assert not states[AT]
    assert states[-1]


def test_changes_are_reported_with_the_same_id():
    losses = healthy(16)
    losses[AT] *= 4.0
    detector = EpisodeDetector()
    reports = [episode for step, loss in enumerate(losses) for episode in detector.observe(row(step, float(loss)))]
    assert {episode.id for episode in reports} == {1}
    assert reports[0].recovery is Recovery.OPEN
    assert reports[-1] == only(detector)


def test_no_more_than_200_episodes_are_kept_the_worst_ones():
    rng = np.random.default_rng(23)
    detector = EpisodeDetector()
    for step in range(400 + 230 * 40):
        spike = step >= 400 and (step - 400) % 40 == (step // 40) % 7
        detector.observe(row(step, (3.0 if spike else 1.0) + 0.01 * rng.normal()))
    assert len(detector.episodes) == 200
    assert detector.dropped > 0
    assert len(json.dumps(detector.state_dict())) < 1_000_000


ANY_LOSS = st.one_of(
    st.floats(width=64),
    st.sampled_from([0.0, -0.0, 1e38, -1e38, 1e-38, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(ANY_LOSS, st.integers(1, 60)), max_size=12))
def test_any_sequence_of_floats_is_taken(runs):
    losses = [loss for loss, times in runs for _ in range(times)]
    detector = watched(losses)
    json.dumps(detector.state_dict())
    assert all(episode.severity <= 99.0 for episode in detector.episodes)
    if any(not math.isfinite(loss) for loss in losses):
        assert detector.episodes


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10_000),
    st.integers(0, 700),
    st.lists(st.tuples(st.integers(50, 690), ANY_LOSS), max_size=4),
    st.booleans(),
)
def test_a_cut_anywhere_changes_no_verdict(seed, cut, wild, shifted):
    losses = healthy(seed, length=700)
    for place, value in wild:
        losses[place] = value
    if shifted:
        with np.errstate(over="ignore"):  # a wild value may become infinite, which is one more that is taken
            losses[500:] *= 3.0
    whole = EpisodeDetector()
    expected = [whole.observe(row(step, float(loss))) for step, loss in enumerate(losses)]
    first, second = EpisodeDetector(), EpisodeDetector()
    found = [first.observe(row(step, float(loss))) for step, loss in enumerate(losses[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(row(step, float(loss))) for step, loss in enumerate(losses[cut:], start=cut)]
    assert repr(found) == repr(expected)
    assert repr(second.finish()) == repr(whole.finish())
    assert repr(second.episodes) == repr(whole.episodes)
