"""Series with an entry for each layer, about an episode.

Against numpy, with rows missing, of another length, and not finite.
"""

import numpy as np
import pytest
from synthetic import Run, an_episode

from lightning_spike.diagnosis.observations.layers import layer_table, shifted_most, usual_of
from lightning_spike.diagnosis.view import EpisodeView


def a_case(rows, names=("a", "b", "c")):
    run = Run(0)
    run.layers["size"] = (names, rows)
    run.episodes = [an_episode(200, 205, 220)]
    store = run.store()
    return EpisodeView(store, store.episodes[0])


def test_the_usual_is_the_median_of_healthy_rows_before_the_onset():
    rng = np.random.default_rng(0)
    values = np.exp(rng.standard_normal((40, 3)))
    rows = {10 * k: values[k] for k in range(40)}
    expected = np.median(values[:20], axis=0)  # up to 190; the batches just before the onset are left out
    np.testing.assert_allclose(usual_of(a_case(rows), "size"), expected, rtol=1e-5)


def test_what_a_row_does_not_concern_is_left_out():
    case = a_case({0: [1, -1, 5], 10: [3, -1, np.inf], 20: [2, -1, 7], 200: [2, 4, 12]})
    np.testing.assert_array_equal(usual_of(case, "size"), [2, np.nan, 6])
    assert np.isnan(layer_table(case, "size", 0, 30).values[:, 1]).all()


@pytest.mark.parametrize(("down", "name", "factor"), [(False, "c", 4.0), (True, "a", 0.5)])
def test_the_entry_that_moved_most_is_named(down, name, factor):
    case = a_case({0: [1, 1, 3], 10: [1, 1, 3], 200: [1, 1, 3], 210: [0.5, 2, 12]})
    moved = shifted_most(case, "size", 200, 220, down=down)
    assert (moved.name, moved.ordinal, moved.observed / moved.expected) == (name, 210, factor)


@pytest.mark.parametrize(
    "rows", [{}, {0: [1, 2]}, {0: [1, 2, 3]}, {200: [1, 2, 3]}, {0: [-1] * 3, 10: [-1] * 3, 200: [1, 2, 3]}]
)
def test_where_nothing_can_be_compared_nothing_is_said(rows):
    assert shifted_most(a_case(rows), "size", 200, 220) is None
