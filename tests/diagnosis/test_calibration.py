"""The data file, and what is refused."""

import json
import math

import pytest

from lightning_spike.diagnosis.calibration import Calibration, fitted
from lightning_spike.diagnosis.catalogue import catalogue


def test_the_package_brings_one_whose_offsets_are_for_causes_that_exist():
    assert set(fitted().offsets) <= {cause.id for cause in catalogue()}
    assert 0 < fitted().unexplained < 1


def test_it_comes_back_from_its_file_as_it_was():
    content = {"temper": 0.7, "unexplained": 0.2, "offsets": {"bad_batch": -0.3}, "made_by": "a command"}
    assert Calibration.of(json.loads(json.dumps(content))) == Calibration(temper=0.7, unexplained=0.2, offsets={"bad_batch": -0.3})  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"temper": 0.0}, {"temper": math.nan}, {"unexplained": 1.0}, {"unexplained": 0.0}, {"offsets": {"a": math.inf}}],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a finite temper"):
        Calibration(**({"temper": 0.6, "unexplained": 0.3} | wrong))
