"""How many control batches are asked: few where they agree, more where they scatter."""

import numpy as np
import pytest

from lightning_spike.lab.replay.evaluate import control_sample_size

EIGHT = list(range(8))


@pytest.mark.parametrize(
    ("rises", "count"),
    [
        pytest.param(np.full(8, 2.0), 2, id="all-alike"),
        pytest.param(2.0 + 0.02 * np.arange(8), 2, id="nearly-alike"),
        pytest.param(np.array([1.0, 1.4] * 4), 4, id="scattered"),
        pytest.param(np.array([1.0, 1.35] * 4), 3, id="somewhat"),
        pytest.param(np.array([-1.0, 1.0] * 4), 4, id="no-rise"),
        pytest.param(np.full(8, -1.0), 4, id="better-than-before"),
    ],
)
def test_the_more_they_differ_the_more_are_asked(rises, count):
    assert control_sample_size(EIGHT, rises) == EIGHT[:count]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_more_than_there_are(count):
    assert len(control_sample_size(EIGHT[:count], np.linspace(-5, 5, count))) == count


def test_those_that_are_chosen_know_the_mean_rise_to_a_tenth():
    """Of many draws at a scatter that two can tell, the two are within a tenth of the mean, give or take, in two of
    three cases, as a standard error promises."""
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 0.12, (400, 8))
    means = [row[: len(control_sample_size(EIGHT, row))].mean() for row in draws]
    assert np.mean(np.abs(np.array(means) - 1.0) < 0.1) > 0.66
