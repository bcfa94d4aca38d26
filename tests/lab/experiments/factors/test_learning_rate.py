"""The learning rate as a factor."""

import dataclasses

import pytest
from lab.made import around, leg, settings

from lightning_spike.lab.experiments.factors import LearningRate

STEADY = [settings(0.1)] * 8


def test_a_jump_is_put_back_to_the_recent_median():
    normal = LearningRate().normal(leg(9, rate=6.0).update, around([leg(9)], before=[*STEADY, settings(0.12)]))
    assert normal.settings[0][0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0.1, 0.103, 0.097])
def test_what_is_as_it_was_is_no_factor(rate):
    assert LearningRate().normal(leg(9, rate=rate).update, around([leg(9)], before=STEADY)) is None


def test_a_drop_is_a_factor_too():
    normal = LearningRate().normal(leg(9, rate=0.001).update, around([leg(9)], before=STEADY))
    assert normal.settings[0][0]["lr"] == pytest.approx(0.1)


def test_too_few_steps_say_nothing():
    assert LearningRate().normal(leg(9, rate=6.0).update, around([leg(9)], before=STEADY[:3])) is None


def test_each_optimizer_is_compared_with_its_own_steps():
    before = [settings(0.1), settings(0.001, place=1)] * 8
    update = dataclasses.replace(leg(9).update, settings=(settings(0.1), settings(0.1, place=1)))
    normal = LearningRate().normal(update, around([leg(9)], before=before))
    assert [step[0]["lr"] for step in normal.settings] == pytest.approx([0.1, 0.001])


def test_each_group_has_its_own_rate():
    before = [settings(0.1, 0.01)] * 8
    update = dataclasses.replace(leg(9).update, settings=(settings(0.1, 0.5),))
    normal = LearningRate().normal(update, around([leg(9)], before=before))
    assert [group["lr"] for group in normal.settings[0]] == pytest.approx([0.1, 0.01])
