"""RMS_t in healthy runs, where gradients outgrow it, and where it is out for other reasons."""

import pytest

from lightning_spike.detectors.second_moment import SecondMomentDetector
from lightning_spike.records import Moment, StepRow


def told(rms, norms):
    detector = SecondMomentDetector()
    found = []
    for k, (value, norm) in enumerate(zip(rms, norms, strict=True)):
        at = Moment(ordinal=10 * k, step=10 * k, epoch=0, batch_idx=k)
        found += detector.observe(StepRow(at=at, values={"update_rms": value, "grad_norm": norm}))
    return [(f.kind, f.at.ordinal) for f in found]


GROWING = [1.0] * 10 + [1.5, 3.0, 9.0, 27.0, 81.0] + [100.0] * 10


def test_gradients_that_outgrow_it_are_told_once():
    rms = [1.2] * 10 + [3.0] * 10 + [1.0] * 5
    assert told(rms, GROWING) == [("second_moment_stale", 130)]


@pytest.mark.parametrize(
    ("rms", "norms"),
    [
        ([1.2] * 25, GROWING),
        ([1.2] * 10 + [3.0] * 15, [1.0] * 25),
        ([1.2, 500.0, 1.0, 1.1, float("inf")] * 5, GROWING),
        ([3.0] * 25, GROWING),
        ([float("nan")] * 25, GROWING),
    ],
)
def test_one_of_the_two_is_not_enough(rms, norms):
    assert told(rms, norms) == []
