"""Robust statistics against numpy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spike.rolling import MAD_TO_SIGMA, LazyWindow, SortedWindow, mad, median, quantile, theil_sen

FINITE = st.floats(min_value=-1e12, max_value=1e12)


@given(st.lists(FINITE, min_size=1, max_size=60), st.floats(0.0, 1.0))
def test_quantile_is_that_of_numpy(values, q):
    assert quantile(sorted(values), q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-3)


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_median_and_mad_are_those_of_numpy(values):
    centre = np.median(values)
    assert median(values) == pytest.approx(centre, rel=1e-9, abs=1e-3)
    assert mad(values) == pytest.approx(np.median(np.abs(values - centre)), rel=1e-9, abs=1e-3)


def test_mad_to_sigma_makes_a_standard_deviation():
    values = np.random.default_rng(3).normal(5.0, 2.0, 200_001)
    assert mad(values.tolist()) * MAD_TO_SIGMA == pytest.approx(2.0, rel=0.02)


@given(st.lists(FINITE, min_size=1, max_size=80), st.integers(1, 20))
def test_window_holds_the_last_values_in_both_orders(values, size):
    window = SortedWindow(size)
    for count, value in enumerate(values):
        leaving = window.push(value)
        assert leaving == (values[count - size] if count >= size else None)
    assert window.values() == values[-size:]
    assert window.ordered == sorted(values[-size:])
    assert len(window) == min(size, len(values))
    assert window.median() == pytest.approx(np.median(values[-size:]), rel=1e-9, abs=1e-3)


@given(st.lists(FINITE, min_size=1, max_size=40), st.lists(FINITE, max_size=40), st.integers(1, 12))
def test_window_goes_on_after_being_replaced_by_its_own_values(first, then, size):
    one, other = SortedWindow(size), SortedWindow(size)
    for value in first:
        one.push(value)
    other.replace(one.values())
    for value in then:
        assert one.push(value) == other.push(value)
    assert one.values() == other.values()


@given(st.lists(st.tuples(FINITE, st.booleans()), min_size=1, max_size=80), st.integers(1, 20))
def test_lazy_window_holds_the_last_values_whenever_it_is_looked_at(pushes, size):
    window, values = LazyWindow(size), []
    for value, look in pushes:
        window.push(value)
        values.append(value)
        if look:
            assert window.ordered == sorted(values[-size:])
            assert window.latest(3) == values[-min(3, size) :][-len(window) :]
        assert window.values() == values[-size:]
        assert len(window) == min(size, len(values))
        assert window.back(1) == value
    window.replace(values)
    assert window.ordered == sorted(values[-size:])


def test_theil_sen_finds_the_slope_beside_outliers():
    values = [0.5 * place for place in range(40)]
    values[7] = 1e6
    values[20] = -1e6
    assert theil_sen(values) == pytest.approx(0.5)
    assert theil_sen([3.0]) == 0.0
