"""When to go back, on rows written by hand and the real episode detector."""

import math

import pytest

from lightning_spike.actions.rollback_policy import MAX_OVERFLOWS, RollbackPolicy
from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.records import Moment, RunFacts, StepRow
from lightning_spike.store import TrainerStateStore


def wishes(losses, policy, roll_back=True):
    """Ordinals and reasons of the wishes over a series, each fulfilled at once."""
    store, detector, out = TrainerStateStore(RunFacts(started="")), EpisodeDetector(), []
    for i, loss in enumerate(losses):
        at = Moment(ordinal=i, step=i, epoch=0, batch_idx=i)
        row = StepRow(at=at, values=loss if isinstance(loss, dict) else {"loss": loss})
        store.append(row)
        changed = detector.observe(row)
        for episode in changed:
            store.replace_episode(episode)
        policy.judge(row, healthy=detector.healthy)
        if (request := policy.request(i, changed, store)) is not None:
            out.append((i, request.reason, request.onset))
            if roll_back:
                policy.rolled_back(i)
    return out


def policy(**options):
    return RollbackPolicy(**({"patience": 10, "max_rollbacks": 99, "cooldown": 40} | options))


def noisy(count, level=1.0):
    return [level * (1 + 0.05 * math.sin(7.3 * i) + 0.03 * math.sin(3.1 * i * i)) for i in range(count)]


def test_a_healthy_run_has_no_reason():
    assert wishes(noisy(2000), policy()) == []


def test_a_loss_that_is_not_finite_is_a_reason_at_once():
    for bad in (math.nan, math.inf, -math.inf):
        assert wishes([*noisy(100), bad, *noisy(50)], policy()) == [(100, "nonfinite", 100)]


def test_a_spike_is_a_reason_only_past_the_patience():
    assert wishes([*noisy(100), *noisy(9, 8.0), *noisy(50)], policy()) == []
    assert wishes([*noisy(100), *noisy(14, 8.0), *noisy(50)], policy()) == [(110, "spike", 100)]


def test_a_divergence_that_the_detector_has_taken_up_is_seen_all_the_same():
    climbing = [v * (1 + 0.004 * i) for i, v in enumerate(noisy(600))]
    ((when, reason, onset), *_) = wishes([*noisy(300), *climbing], policy(patience=100), roll_back=False)
    assert reason == "divergence"
    assert 250 <= onset <= 400
    assert when - onset >= 100


def test_each_rollback_in_a_row_waits_longer_and_a_calm_stretch_forgives():
    found = [i for i, *_ in wishes([*noisy(100), *[math.nan] * 40], policy())]
    assert found == [100, 101, 103, 107, 115, 131], "held off for 0, 1, 3, 7, 15 batches"
    apart = [*noisy(100), math.nan, *noisy(100), math.nan, math.nan, *noisy(30), math.nan]
    assert [i for i, *_ in wishes(apart, policy())] == [100, 201, 202, 233]


def test_the_patience_doubles_after_a_rollback_that_did_not_help():
    found = [i for i, *_ in wishes([*noisy(100), *noisy(31, 8.0)], policy())]
    assert found == [110]
    found = [i for i, *_ in wishes([*noisy(100), *noisy(11, 8.0), *noisy(2), *noisy(25, 8.0)], policy())]
    assert found == [110, 131]


def test_under_a_scaler_only_a_loss_that_stays_non_finite_is_a_reason():
    forgiving = policy()
    forgiving.under_scaler()
    series = [*noisy(100), *[math.inf] * (MAX_OVERFLOWS - 1), *noisy(60), *[math.nan] * MAX_OVERFLOWS, *noisy(9)]
    assert [(i, r) for i, r, _ in wishes(series, forgiving)] == [
        (100 + MAX_OVERFLOWS - 1 + 60 + MAX_OVERFLOWS - 1, "nonfinite")
    ]


def test_a_further_value_may_be_nan_by_design_but_not_one_of_several_losses():
    rows = [{"loss": v, "loss/extra": math.nan if i > 20 else v} for i, v in enumerate(noisy(90))]
    assert wishes(rows, policy()) == []
    rows = [{"loss/a": v, "loss/b": math.nan if i == 30 else v} for i, v in enumerate(noisy(40))]
    assert wishes(rows, policy()) == [(30, "nonfinite", 30)]


@pytest.mark.parametrize("late", [0, 5])
def test_rows_from_before_a_rollback_that_arrive_after_it_say_nothing(late):
    """On a GPU the numbers come some batches late.

    The row that was poisoned before the rollback must not cause another.
    """
    store, chosen = TrainerStateStore(RunFacts(started="")), policy()
    chosen.rolled_back(20 + late)
    for i in range(21 + late):
        row = StepRow(at=Moment(ordinal=i, step=i, epoch=0, batch_idx=i), values={"loss": math.nan})
        chosen.judge(row, healthy=False)
    assert chosen.request(22 + late, [], store) is None


def test_the_budget_is_counted_and_a_failed_attempt_is_free():
    chosen = policy(max_rollbacks=2)
    chosen.failed(1)
    chosen.rolled_back(2)
    assert not chosen.spent
    chosen.rolled_back(9)
    assert chosen.spent
