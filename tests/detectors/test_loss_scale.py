"""Scales as a scaler moves them, and as it does not."""

from lightning_spike.detectors.loss_scale import LossScaleDetector
from lightning_spike.records import Moment, StepRow


def kinds(scales, skips=()):
    detector = LossScaleDetector()
    found = []
    for k, scale in enumerate(scales):
        at = Moment(ordinal=k, step=k, epoch=0, batch_idx=k)
        values = {} if scale is None else {"loss_scale": float(scale), "skipped_step": float(k in skips)}
        found += detector.observe(StepRow(at=at, values=values))
    return [(f.kind, f.at.ordinal) for f in found]


def test_a_scaler_by_itself():
    halved = [2.0 ** max(16 - k, 3) for k in range(200)]
    grown = [2.0 ** (10 + k // 50) for k in range(400)]
    assert kinds(halved, skips=range(13)) == []
    assert kinds(grown, skips={100, 300}) == []
    assert kinds([None] * 50) == []


def test_a_leap_up_and_the_updates_that_it_costs():
    scales = [1024.0] * 50 + [2.0**40 / 2**k for k in range(30)] + [2.0**10] * 200
    assert kinds(scales, skips=range(50, 80)) == [("scale_leapt", 50), ("often_skipped", 52)]


def test_a_scale_held_down():
    assert kinds([1024.0] * 50 + [2.0**-20] * 50) == [("scale_leapt", 50), ("scale_too_low", 52)]
    assert kinds([0.5] * 2 + [1.0] * 50) == []


def test_a_scale_that_is_no_number_is_borne():
    assert kinds([float("nan"), 0.0, float("inf"), 1.0]) is not None
