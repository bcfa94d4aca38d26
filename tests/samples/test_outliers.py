import numpy as np
import pytest
from scipy import stats

from lightning_spike.samples.outliers import discoveries, tail_probabilities


@pytest.mark.parametrize("size", [32, 256])
def test_of_an_exponential_variable_the_tail_is_right_on_average(size):
    """How often fresh values fall below a chance is that chance: also far beyond the largest of the usual ones."""
    rng = np.random.default_rng(0)
    told = np.concatenate(
        [tail_probabilities(rng.exponential(size=200), rng.exponential(size=size)) for _ in range(2000)]
    )
    for chance in (0.05, 0.01, 0.001):
        assert np.mean(told <= chance) == pytest.approx(chance, rel=0.25)


def test_below_the_tail_the_rank_decides():
    usual = np.arange(100.0)
    assert tail_probabilities(np.array([50.0, -1.0]), usual).tolist() == pytest.approx([51 / 101, 1.0])


def test_what_is_not_finite_is_beyond_all_and_no_reference():
    usual = np.append(np.random.default_rng(0).exponential(size=64), [np.nan, np.inf])
    told = tail_probabilities(np.array([np.nan, np.inf, 0.1]), usual)
    assert told[:2].tolist() == [0.0, 0.0]
    assert told[2] > 0.5


def test_values_that_are_all_alike_make_no_outlier_of_a_rounding_error():
    assert tail_probabilities(np.array([1.0 + 1e-6]), np.ones(64))[0] > 0.05
    assert tail_probabilities(np.array([3.0]), np.ones(64))[0] < 1e-5


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_discoveries_are_those_of_benjamini_and_hochberg(rate):
    rng = np.random.default_rng(1)
    for _ in range(50):
        chances = rng.random(32) ** rng.choice([1, 3, 6], 32)
        expected = stats.false_discovery_control(chances, method="bh") <= rate
        assert discoveries(chances, rate).tolist() == expected.tolist()


def test_nothing_is_found_where_nothing_is():
    assert not discoveries(np.linspace(0.2, 1.0, 32), 0.05).any()
