"""The answers of the experiments, put together."""

import pytest

from lightning_spike.lab.experiments.attribution import Attribution, Share
from lightning_spike.lab.experiments.blame import GROUPS, blame, blame_outside, blame_steps
from lightning_spike.lab.experiments.cooldown_test import Cooldown
from lightning_spike.lab.experiments.split import Split
from lightning_spike.lab.experiments.step_size import Consistency


def split(data, weights, interaction=0.0, verdict="both", computation=0.0):
    return Split(
        jump=1.0,
        data=data,
        weights=weights,
        interaction=interaction,
        computation=computation,
        excess=data,
        noise=0.1,
        verdict=verdict,
        text="",
    )


def damage(intrinsic=0.0, *, odd=True, **shares):
    parts = tuple(Share(factor=group, group=group, share=share, error=0.0) for group, share in shares.items())
    return Attribution(
        ordinal=1, step=1, updates=1, damage=1.0, shares=parts, finer=(), odd_batch=odd, intrinsic=intrinsic, normal=()
    )


def steps(worsened, updates=11):
    return Consistency(rho=0.9, worsened=worsened / updates, against=0.0, updates=updates)


CALM, WILD = steps(0), steps(7)


def test_what_is_computed_has_its_share():
    shares = blame(split(0.1, 0.1, verdict="computation", computation=0.8), None, None, None).shares
    assert shares["computation"] == pytest.approx(0.8 / (0.8 + 0.1 + 0.1 * 0.5))


def test_a_bad_batch_has_it_all():
    assert blame(split(1.0, 0.0, verdict="data"), CALM, None, None).shares["data"] == 1.0


def test_the_weights_part_is_shared_out_as_the_damage_is():
    found = blame(split(0.0, 1.0), CALM, None, damage(learning_rate=0.9, optimizer=0.1))
    assert found.first == "learning_rate"
    assert found.shares["learning_rate"] == pytest.approx(0.9)


def test_two_at_once_both_have_their_part():
    found = blame(split(0.5, 0.5), CALM, None, damage(learning_rate=1.0))
    assert found.shares["data"] == pytest.approx(found.shares["learning_rate"])


def test_what_only_both_together_make_is_halved():
    found = blame(split(0.2, 0.4, interaction=0.4), CALM, None, damage(learning_rate=1.0))
    assert found.shares["data"] == pytest.approx(0.4)


def test_a_batch_that_is_ordinary_for_calmed_weights_is_excused():
    found = blame(split(1.0, 0.0), WILD, Cooldown(before=2.0, after=0.0, steps=12), None)
    assert found.shares["intrinsic"] == 1.0


def test_an_ordinary_batch_cannot_help_what_its_step_did():
    assert blame(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=False)).first == "intrinsic"
    assert blame(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=True)).first == "data"
    with_rate = blame(split(0.0, 1.0), CALM, None, damage(data=0.7, learning_rate=0.3, odd=False))
    assert with_rate.shares["learning_rate"] == 1.0


def test_momentum_swung_up_by_steps_that_are_too_long_is_excused():
    assert blame(split(0.0, 1.0), WILD, None, damage(optimizer=1.0)).first == "intrinsic"
    assert blame(split(0.0, 1.0), CALM, None, damage(optimizer=1.0)).first == "optimizer"


def test_a_batch_whose_step_did_damage_is_excused_where_all_steps_are_too_long():
    assert blame(split(0.0, 1.0), WILD, None, damage(data=1.0, odd=True)).first == "intrinsic"
    assert blame(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=True)).first == "data"


def test_where_too_few_updates_say_the_odds_are_even():
    shares = blame(split(0.0, 1.0), None, None, damage(optimizer=1.0)).shares
    assert shares["optimizer"] == shares["intrinsic"] == 0.5


def test_nothing_but_long_steps():
    assert blame_steps().shares == dict.fromkeys(GROUPS, 0.0) | {"intrinsic": 1.0}


@pytest.mark.parametrize("verdict", ["noise", "not_reproduced"])
def test_where_nothing_was_found_nobody_is_blamed(verdict):
    found = blame(split(1.0, 0.0, verdict=verdict), CALM, None, None)
    assert (found.shares, found.first) == ({}, None)


@pytest.mark.parametrize(("kind", "first"), [("weights", "outside"), ("optimizer", "optimizer")])
def test_what_came_from_outside(kind, first):
    assert blame_outside(kind).first == first


def test_the_share_of_worsened_updates_decides_between_two_rates():
    assert steps(0).p_chronic < 0.02 < steps(2).p_chronic < steps(3).p_chronic
    assert steps(4).p_chronic > 0.95


def test_weights_that_no_single_update_has_ruined_are_the_steps_doing_and_not_the_batchs():
    assert blame(split(0.2, 0.7), WILD, None, None).first == "intrinsic"
    assert blame(split(0.9, 0.05), CALM, None, None).shares["data"] > 0.95


def test_a_batch_that_may_stand_out_for_long_steps_only_is_believed_as_far_as_it_may_not():
    shares = blame(split(1.0, 0.0, verdict="data"), WILD, None, None, doubt=0.8).shares
    assert shares["data"] == pytest.approx(0.2)
    assert shares["intrinsic"] == pytest.approx(0.8)
    calm = Cooldown(before=1.0, after=1.0, steps=12)
    assert blame(split(1.0, 0.0, verdict="data"), WILD, calm, None, doubt=0.8).shares["data"] == 1.0


def test_a_step_made_with_a_changed_computation_is_the_changes_doing():
    found = blame(split(0.0, 0.6, computation=0.4), CALM, None, damage(intrinsic=1.0))
    assert found.shares["computation"] == 1.0
    kept = blame(split(0.0, 0.9, computation=0.1), CALM, None, damage(intrinsic=1.0))
    assert kept.first == "intrinsic"
    rate = blame(split(0.0, 0.6, computation=0.4), CALM, None, damage(learning_rate=1.0))
    assert rate.shares["learning_rate"] == pytest.approx(0.6)


def test_a_gradient_that_was_turned_has_what_its_step_and_its_momentum_did():
    found = blame(split(0.0, 1.0), CALM, None, damage(intrinsic=0.6, optimizer=0.3, learning_rate=0.1), turned=True)
    assert found.shares["gradient"] == pytest.approx(0.9)
    assert found.shares["intrinsic"] == found.shares["optimizer"] == 0.0
