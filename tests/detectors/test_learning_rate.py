"""What the learning rate did, told from torch's own schedulers and from rates that no scheduler made."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers

from lightning_spike.detectors.learning_rate import LearningRateDetector
from lightning_spike.records import Moment, SchedulerFacts


def moment(step, per_epoch=50):
    return Moment(ordinal=step, step=step, epoch=step // per_epoch, batch_idx=step % per_epoch)


def rates(make, length=300, every=1):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    found = []
    for step in range(length):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


def facts(name, interval="step", **settings_):
    return SchedulerFacts(class_name=name, optimizer="SGD", interval=interval, frequency=1, settings=settings_)


def found(lrs, schedulers_=None, **options):
    detector = LearningRateDetector(schedulers_, **options)
    return [finding for step, lr in enumerate(lrs) for finding in detector.observe("lr/SGD", moment(step), lr)]


def kinds(findings):
    return [(finding.kind, finding.at.ordinal) for finding in findings]


def test_warm_restarts_are_found_with_their_period():
    findings = found(
        rates(lambda o: schedulers.CosineAnnealingWarmRestarts(o, 50)), [facts("CosineAnnealingWarmRestarts", T_0=50)]
    )
    assert kinds(findings) == [("restart", step) for step in (50, 100, 150, 200, 250)]
    assert [finding.detail["period"] for finding in findings] == [None, 50, 50, 50, 50]
    assert findings[0].detail["planned"] is True
    assert findings[0].detail["to_lr"] == pytest.approx(0.1)
    assert findings[0].detail["scheduler"] == "CosineAnnealingWarmRestarts"


def test_restarts_that_grow_apart_are_found_too():
    findings = found(rates(lambda o: schedulers.CosineAnnealingWarmRestarts(o, 20, T_mult=2)))
    assert kinds(findings) == [("restart", 20), ("restart", 60), ("restart", 140)]


def begun_late(optimizer):
    """The peak of the first cycle is left out, so that the restart goes far above every rate before it."""
    scheduler = schedulers.CosineAnnealingWarmRestarts(optimizer, 1000)
    scheduler.step(900)
    return scheduler


def test_a_restart_to_the_configured_peak_is_one_however_low_the_run_was_before():
    configured = [facts("CosineAnnealingWarmRestarts", T_0=1000, base_lrs=(0.1,))]
    findings = found(rates(begun_late), configured)
    assert kinds(findings) == [("restart", 100)]
    assert findings[0].detail["ratio"] > 1000
    jumped = [0.8 * lr if step >= 100 else lr for step, lr in enumerate(rates(begun_late))]
    assert kinds(found(jumped, configured))[0] == ("unexplained_jump", 100)


def test_cycles_have_peaks():
    findings = found(rates(lambda o: schedulers.CyclicLR(o, 0.001, 0.1, 20)), [facts("CyclicLR")])
    assert kinds(findings) == [("cyclic_peak", step) for step in range(20, 300, 40)]
    assert findings[1].detail["period"] == 40
    one_cycle = found(rates(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=301)), [facts("OneCycleLR")])
    assert kinds(one_cycle) == [("cyclic_peak", 89)]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.CosineAnnealingLR(o, 300),
        lambda o: schedulers.ExponentialLR(o, 0.98),
        lambda o: schedulers.PolynomialLR(o, 300, power=2.0),
        lambda o: schedulers.LambdaLR(o, lambda _: 1.0),
    ],
    ids=["cosine", "exponential", "polynomial", "constant"],
)
def test_smooth_schedules_say_nothing(make):
    assert found(rates(make)) == []


@pytest.mark.parametrize("start", [0.0, 1e-6, 0.01], ids=str)
def test_a_warm_up_is_no_jump(start):
    findings = found(rates(lambda o: schedulers.LambdaLR(o, lambda step: start + (1.0 - start) * min(1.0, step / 40))))
    assert [finding.kind for finding in findings] == ["warmup_end"]
    assert 40 <= findings[0].at.ordinal <= 43


def test_steps_down_are_drops():
    assert kinds(found(rates(lambda o: schedulers.StepLR(o, 100)))) == [("drop", 100), ("drop", 200)]


@pytest.mark.parametrize("configured", [None, [], [facts("ExponentialLR")]], ids=["unknown", "none", "monotone"])
def test_a_peak_that_nobody_planned(configured):
    lrs = [
        lr * (10.0 if step == 150 else 1.0)
        for step, lr in enumerate(rates(lambda o: schedulers.ExponentialLR(o, 0.999)))
    ]
    findings = found(lrs, configured)
    assert kinds(findings) == [("unexplained_jump", 150), ("drop", 151)]
    assert findings[0].detail["ratio"] == pytest.approx(9.99, rel=1e-3)
    assert findings[0].detail["expected_lr"] == pytest.approx(lrs[150] / 10.0, rel=1e-3)
    assert findings[1].detail["after_jump"] is True


def test_a_return_to_the_peak_inside_a_monotone_scheduler_is_no_restart():
    lrs = [0.1 * 0.98**step for step in range(100)] * 2
    assert found(lrs, [facts("ExponentialLR")])[0].kind == "unexplained_jump"
    assert found(lrs, None)[0].kind == "restart"


def test_moves_inside_an_epoch_under_an_epoch_schedule():
    lrs = rates(lambda o: schedulers.ExponentialLR(o, 0.99))
    (finding,) = found(lrs, [facts("ExponentialLR", "epoch")])
    assert (finding.kind, finding.detail["configured"], finding.detail["observed"]) == (
        "wrong_interval",
        "epoch",
        "step",
    )
    assert found(rates(lambda o: schedulers.ExponentialLR(o, 0.99), every=50), [facts("ExponentialLR", "epoch")]) == []


def test_a_length_in_epochs_under_a_step_schedule():
    configured = [facts("CosineAnnealingLR", T_max=10)]
    (finding,) = found([0.1] * 5, configured, max_epochs=10, steps_per_epoch=50)
    assert (finding.kind, finding.detail["setting"], finding.detail["value"]) == ("wrong_interval", "T_max", 10)
    assert found([0.1] * 5, configured, max_epochs=20, steps_per_epoch=50) == []


def test_a_break_across_a_resume_is_flagged_and_a_planned_restart_is_not():
    detector = LearningRateDetector([])
    for step in range(100):
        detector.observe("lr/SGD", moment(step), 0.01)
    resumed = LearningRateDetector([])
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    (finding,) = resumed.observe("lr/SGD", moment(100), 0.1)
    assert (finding.kind, finding.detail["resumed"]) == ("unexplained_jump", True)
    assert finding.detail["expected_lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1], ids=str)
def test_a_rate_that_is_none_is_said_once(lr):
    assert kinds(found([0.1, lr, lr, 0.1])) == [("nonfinite", 1)]


LR = st.one_of(st.floats(), st.sampled_from([0.0, 0.1, 0.01, 1e-38, 1e308]))


@settings(deadline=None, max_examples=60)
@given(st.lists(LR, max_size=60), st.data())
def test_any_rates_are_taken_and_a_cut_changes_nothing(lrs, data):
    cut = data.draw(st.integers(0, len(lrs)))
    expected = found(lrs)
    first, second = LearningRateDetector(), LearningRateDetector()
    got = [f for step, lr in enumerate(lrs[:cut]) for f in first.observe("lr/SGD", moment(step), lr)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), resumed=False)
    got += [f for step, lr in enumerate(lrs[cut:], start=cut) for f in second.observe("lr/SGD", moment(step), lr)]
    assert repr(got) == repr(expected)
