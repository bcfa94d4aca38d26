"""The ruler: calibrated under normal noise, whatever the level, sign or trend."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spike.detectors.baseline import Baseline


def scores(values):
    baseline = Baseline()
    found = []
    for value in values:
        found.append(baseline.score(value))
        baseline.push(value)
    return baseline, np.array(found)


@pytest.mark.parametrize("level", [1000.0, 2.3, -4.0], ids=str)
def test_scores_of_normal_noise_are_standard_normal(level):
    values = level + 0.04 * abs(level) * np.random.default_rng(11).normal(size=8000)
    baseline, found = scores(values.tolist())
    assert np.quantile(found[1000:], 0.8413) == pytest.approx(1.0, abs=0.08)
    assert np.quantile(found[1000:], 0.9987) == pytest.approx(3.0, abs=0.35)
    assert baseline.level == pytest.approx(level, rel=0.03)
    assert baseline.spread == pytest.approx(0.04 * abs(level), rel=0.25)


def test_a_steep_fall_widens_nothing():
    steps = np.arange(400)
    values = 10.0 * np.exp(-steps / 80.0) * (1.0 + 0.01 * np.random.default_rng(12).normal(size=400))
    baseline, found = scores(values.tolist())
    assert found[100:].max() < 4.0
    assert baseline.spread / values[-1] < 0.05


def test_the_limit_is_wide_for_few_values_and_for_heavy_tails():
    rng = np.random.default_rng(13)
    early, _ = scores(rng.normal(5.0, 0.1, 60).tolist())
    late, _ = scores(rng.normal(5.0, 0.1, 3000).tolist())
    heavy, _ = scores((5.0 + 0.1 * rng.standard_t(3, 3000)).tolist())
    assert late.limit < early.limit
    assert late.limit < heavy.limit


def test_a_noisier_batch_scores_less():
    baseline, _ = scores(np.random.default_rng(14).normal(5.0, 0.1, 200).tolist())
    assert baseline.score(6.0, noise=4.0) == pytest.approx(baseline.score(6.0) / 4.0)


def test_nothing_is_said_before_there_is_a_baseline():
    baseline = Baseline()
    assert baseline.level is None
    assert not baseline.ready
    assert baseline.score(1e9) == 0.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=40, max_size=200), st.data())
def test_a_cut_changes_nothing(values, data):
    cut = data.draw(st.integers(0, len(values)))
    whole, one = scores(values)
    first, before = scores(values[:cut])
    second = Baseline()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = []
    for value in values[cut:]:
        after.append(second.score(value))
        second.push(value)
    np.testing.assert_array_equal(one, np.array([*before, *after]))
    assert second.state_dict() == whole.state_dict()
