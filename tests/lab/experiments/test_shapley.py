"""Shapley shares against the definition: the mean contribution over all orders."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spike.lab.experiments.attribution import combinations, shapley

PLAYERS = ("a", "b", "c")


def by_orders(players, value):
    orders = list(itertools.permutations(players))
    shares = dict.fromkeys(players, 0.0)
    for order in orders:
        there = frozenset()
        for player in order:
            shares[player] += (value(there | {player}) - value(there)) / len(orders)
            there |= {player}
    return shares


@given(st.lists(st.floats(-100, 100), min_size=8, max_size=8))
def test_they_are_the_mean_over_all_orders(worths):
    value = dict(zip(combinations(PLAYERS), worths, strict=True)).__getitem__
    found = shapley(PLAYERS, value)
    assert {name: float(share) for name, share in found.items()} == pytest.approx(by_orders(PLAYERS, value), abs=1e-9)


@given(st.lists(st.floats(-100, 100), min_size=8, max_size=8))
def test_they_add_up(worths):
    value = dict(zip(combinations(PLAYERS), worths, strict=True)).__getitem__
    total = value(frozenset(PLAYERS)) - value(frozenset())
    assert sum(map(float, shapley(PLAYERS, value).values())) == pytest.approx(total, abs=1e-9)


def test_a_row_of_repetitions_gives_a_row_of_shares():
    shares = shapley(("a", "b"), lambda s: np.array([len(s), 2.0 * ("a" in s)]))
    assert shares["a"].tolist() == [1.0, 2.0]
    assert shares["b"].tolist() == [1.0, 0.0]


def test_nobody_has_nothing():
    assert shapley((), lambda _: np.zeros(1)) == {}
