"""Overfitting is a rise beyond the noise with a gap that grows, and nothing less."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spike.detectors.overfit import OverfitDetector
from lightning_spike.records import Moment, ValidationPoint


def point(place, value, train):
    at = Moment(ordinal=place * 10, step=place * 10, epoch=place, batch_idx=9)
    return ValidationPoint(
        at=at, metric="val_loss", value=float(value), train_loss=None if train is None else float(train)
    )


def watched(values, trains):
    detector = OverfitDetector()
    return detector, [
        finding
        for place, (value, train) in enumerate(zip(values, trains, strict=True))
        for finding in detector.observe(point(place, value, train))
    ]


FALLING = np.exp(-np.arange(40) / 12.0) + 0.1


def test_an_overfit_is_found_and_dated_to_the_best_validation():
    values = 1.0 + 0.02 * np.abs(np.arange(40) - 15.0) + 0.003 * np.random.default_rng(1).normal(size=40)
    detector, (finding,) = watched(values, FALLING)
    best = int(np.argmin(values[:22]))
    assert (finding.detector, finding.kind) == ("overfit", "gap_growing")
    assert detector.overfit
    assert abs(finding.detail["best_ordinal"] - 10 * best) <= 20
    assert finding.detail["gl"] == pytest.approx(100.0 * (finding.detail["value"] / finding.detail["best_value"] - 1.0))
    assert finding.detail["gap_slope"] > 0.0
    assert finding.detail["up"] >= 3
    assert 15 < finding.at.epoch <= 24


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_or_flat_validation_loss_is_no_overfit(seed):
    rng = np.random.default_rng(seed)
    flat = 1.0 + 0.05 * rng.normal(size=60)
    falling = 1.0 + 0.5 * np.exp(-np.arange(60) / 15.0) + 0.05 * rng.normal(size=60)
    trains = np.exp(-np.arange(60) / 20.0) + 0.1
    assert watched(flat, trains)[1] == []
    assert watched(falling, trains)[1] == []


def test_a_rise_of_both_losses_is_no_overfit():
    values = 1.0 + 0.03 * np.abs(np.arange(40) - 15.0)
    assert watched(values, values - 0.2)[1] == []


def test_swings_of_the_training_loss_after_it_are_found():
    values = 1.0 + 0.03 * np.abs(np.arange(60) - 12.0)
    trains = np.exp(-np.arange(60) / 12.0) + 0.3 + np.where(np.arange(60) > 44, 0.05 * (-1.0) ** np.arange(60), 0.0)
    _, findings = watched(values, trains)
    assert [finding.kind for finding in findings] == ["gap_growing", "widening_swings"]


def test_a_new_best_ends_it():
    values = [*(1.0 + 0.03 * np.abs(np.arange(25) - 10.0)), 0.9, 0.8]
    detector, findings = watched(values, np.exp(-np.arange(27) / 12.0))
    assert len(findings) == 1
    assert not detector.overfit


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(), st.one_of(st.none(), st.floats())), max_size=40), st.data())
def test_any_values_are_taken_and_a_cut_changes_nothing(pairs, data):
    cut = data.draw(st.integers(0, len(pairs)))
    whole, expected = watched([value for value, _ in pairs], [train for _, train in pairs])
    first, got = watched([value for value, _ in pairs[:cut]], [train for _, train in pairs[:cut]])
    second = OverfitDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [f for place, pair in enumerate(pairs[cut:], start=cut) for f in second.observe(point(place, *pair))]
    assert repr(got) == repr(expected)
    assert repr(second.state_dict()) == repr(whole.state_dict())
