"""The data file against the causes, and what is refused."""

import math

import pytest
from synthetic import a_cause

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.observations.experiments import share_of_jump
from lightning_spike.diagnosis.weights import EVERY_CAUSE, Weights, content, fitted, parse

TABLE = content()["weights"]


@pytest.mark.parametrize("cause", catalogue(), ids=lambda cause: cause.id)
def test_every_observer_of_a_cause_has_weights_and_every_weight_an_observer_that_gives_its_level(cause):
    levels = {one.name: set(map(str, one.levels)) for one in (*cause.requires, *cause.observations)}
    assert levels.keys() == TABLE[cause.id].keys()
    for observer, weights in TABLE[cause.id].items():
        assert weights.keys() <= levels[observer], observer


def test_a_missing_premise_weighs_against_its_cause():
    for cause in catalogue():
        for one in cause.requires:
            assert all(by_hand <= 0 for by_hand, _ in TABLE[cause.id][one.name].values()), (cause.id, one.name)


def test_the_share_of_the_jump_weighs_the_same_for_every_cause():
    one = share_of_jump(frozenset())
    assert set(TABLE[EVERY_CAUSE][one.name]) == set(one.levels)
    assert TABLE.keys() - {EVERY_CAUSE} == {cause.id for cause in catalogue()}


def test_a_fitted_weight_keeps_the_sign_of_the_one_set_by_hand():
    pairs = [pair for of in TABLE.values() for levels in of.values() for pair in levels.values()]
    assert all(by_hand * fitted >= 0 for by_hand, fitted in pairs)


def test_the_offsets_are_for_causes_that_exist():
    assert set(fitted().offsets) <= {cause.id for cause in catalogue()}
    assert 0 < fitted().unexplained < 1


def test_both_tables_are_read():
    pair = {"temper": 0.7, "unexplained": 0.2, "offsets": {"a": -0.3}, "weights": {"a": {"o": {"x": [3.0, 2.5]}}}}
    assert parse(pair).of("a", "o", "x", {}) == 2.5
    assert parse(pair, by_hand=True).of("a", "o", "x", {}) == 3.0


def test_a_cause_that_the_file_does_not_list_weighs_by_its_own_table():
    own = a_cause("new", weights={"look": {"seen": 4.0}}).weights
    assert fitted().of("new", "look", "seen", own) == 4.0
    assert fitted().of("new", "look", "never", own) is None
    assert fitted().of("bad_batch", "look", "seen", own) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"temper": 0.0}, {"temper": math.nan}, {"unexplained": 1.0}, {"unexplained": 0.0}, {"offsets": {"a": math.inf}},
        {"table": {"a": {"o": {"x": math.nan}}}},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="expected finite numbers"):
        Weights(**({"temper": 0.6, "unexplained": 0.3} | wrong))
