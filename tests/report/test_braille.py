import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spike.report.braille import draw


def dots(drawing):
    """Set dots of each dot column, from below, decoded from the characters by their Unicode names' own numbering."""
    numbering = {1: (0, 0), 2: (1, 0), 3: (2, 0), 4: (0, 1), 5: (1, 1), 6: (2, 1), 7: (3, 0), 8: (3, 1)}
    height = 4 * len(drawing.rows)
    columns = [set() for _ in range(2 * drawing.width)]
    for r, row in enumerate(drawing.rows):
        for c, character in enumerate(row):
            bits = ord(character) - 0x2800 if character != " " else 0
            for dot, (down, right) in numbering.items():
                if bits >> (dot - 1) & 1:
                    columns[2 * c + right].add(height - 1 - (4 * r + down))
    return columns


def test_a_straight_line_is_a_diagonal_of_dots():
    drawn = draw(np.arange(8), np.arange(8.0) - 3, width=4, height=2)
    assert [max(c) for c in dots(drawn)] == list(range(8))
    assert (drawn.low, drawn.high, drawn.log) == (-3.0, 4.0, False)


def test_one_high_value_among_ten_thousand_reaches_the_top():
    values = np.ones(10_000)
    values[7_003] = 2.0
    drawn = draw(np.arange(10_000), values, width=50, height=4)
    assert [i for i, column in enumerate(dots(drawn)) if 15 in column] == [70]


def test_a_wide_range_is_drawn_on_a_log_scale():
    drawn = draw(np.arange(5), np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0]), width=5, height=3)
    assert drawn.log
    assert [max(column) for column in dots(drawn)[::2]] == [0, 3, 6, 8, 11]


def test_values_that_are_not_finite_leave_a_gap_and_a_cross():
    values = np.array([1.0, 1.0, np.nan, np.inf, 1.0, 1.0])
    drawn = draw(np.arange(6), values, width=3, height=1)
    assert drawn.rows[0][1] == "×"
    assert drawn.low == drawn.high == 1.0


def test_nothing_finite_is_no_drawing():
    assert draw(np.arange(3), np.full(3, np.nan), width=10, height=2) is None


def test_a_batch_has_its_column_and_one_outside_the_nearest():
    drawn = draw(np.arange(100, 200), np.arange(100.0), width=10, height=2)
    assert [drawn.column(o) for o in (0, 100, 109, 110, 199, 500)] == [0, 0, 0, 1, 9, 9]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(), min_size=1, max_size=80),
    width=st.integers(1, 30),
    height=st.integers(1, 5),
)
def test_any_series_is_drawn_in_its_box(values, width, height):
    drawn = draw(np.arange(len(values)), np.array(values), width=width, height=height)
    if drawn is None:
        assert not np.isfinite(values).any()
    else:
        assert [len(row) for row in drawn.rows] == [width] * height


@pytest.mark.parametrize("value", [0.0, -2.0, 1e300])
def test_a_single_value_is_drawn(value):
    assert draw(np.array([5]), np.array([value]), width=4, height=2).low == value
