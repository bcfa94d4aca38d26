"""Constants of a run as factors: only where they are unusual."""

import pytest
from lab.made import adam_state, around, leg

from lightning_spike.lab.experiments.factors import Epsilon, Precision


@pytest.mark.parametrize(("eps", "tried"), [(1e-16, True), (1e-8, False), (1e-5, False)])
def test_epsilon_is_tried_where_it_is_far_below_the_default(eps, tried):
    alone = [leg(3, adam_state(3, eps=eps))]
    normal = Epsilon().normal(alone[0].update, around(alone, defaults={"eps": 1e-8}))
    assert (normal is not None) is tried
    if tried:
        assert normal.settings[0][0]["eps"] == 1e-8


def test_an_optimizer_without_one_has_none_to_try():
    alone = [leg(3)]
    assert Epsilon().normal(alone[0].update, around(alone)) is None


@pytest.mark.parametrize("mixed", [True, False])
def test_precision_is_tried_where_it_is_low(mixed):
    alone = [leg(3)]
    normal = Precision().normal(alone[0].update, around(alone, is_mixed=mixed))
    assert (normal is not None and normal.in_float32) is mixed
