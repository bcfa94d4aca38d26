"""What the results of the lab mean: the shares of a jump, the verdict of a split, and what is confirmed."""

import math

import pytest
from lab_results import born, experiments, order, outside, replay, split_of, update

from lightning_spike.diagnosis import judgement
from lightning_spike.diagnosis.judgement import (
    Group,
    SplitVerdict,
    birth_confirms,
    confirmed,
    is_chronic,
    jump_shares,
    only_steps,
    order_confirms,
    outside_shares,
    p_chronic,
    share_confirms,
    share_level,
    split_refutes,
    split_verdict,
    steps_too_long,
    steps_too_long_in_quiet_run,
    update_direction,
    verdict_of,
)
from lightning_spike.experiments import Attribution, Cooldown, FactorShare, StepSize


def split(data, weights, interaction=0.0, computation=0.0, **fields):
    return split_of(
        data_effect=data, weights_effect=weights, interaction_effect=interaction, computation_effect=computation,
        excess=data, noise=0.01, **fields,
    )  # fmt: skip


def damage(intrinsic=0.0, *, odd=True, **shares):
    parts = tuple(FactorShare(factor=group, group=group, share=share, error=0.0) for group, share in shares.items())
    return Attribution(
        ordinal=1, step=1, updates=1, damage=1.0, shares=parts, finer=(), odd_batch=odd, intrinsic=intrinsic,
        at_baseline=(),
    )  # fmt: skip


def steps(worsened, updates=11):
    return StepSize(rho=0.9, worsened=worsened / updates, against=0.0, overshot=worsened / updates, updates=updates)


CALM, WILD = steps(0), steps(7)


def shares_of(split, step_size, cooldown, attribution, *, turned=False):
    measured = update(slope=-1.0, slope_usual=1.0) if turned else None
    return jump_shares(
        experiments(
            replay=replay(), split=split, step_size=step_size, cooldown=cooldown, attribution=attribution,
            update=measured,
        )
    )  # fmt: skip


def first(shares):
    return max(shares, key=shares.get)


def test_what_is_computed_has_its_share():
    parts = split(0.1, 0.1, computation=0.8)
    assert verdict_of(parts) == "computation"
    shares = shares_of(parts, None, None, None)
    assert shares["computation"] == pytest.approx(0.8 / (0.8 + 0.1 + 0.1 * 0.5))


def test_a_bad_batch_has_it_all():
    assert verdict_of(split(1.0, 0.0)) == "data"
    assert shares_of(split(1.0, 0.0), CALM, None, None)["data"] == 1.0


def test_the_weights_part_is_shared_out_as_the_damage_is():
    found = shares_of(split(0.0, 1.0), CALM, None, damage(learning_rate=0.9, optimizer=0.1))
    assert first(found) == "learning_rate"
    assert found["learning_rate"] == pytest.approx(0.9)


def test_two_at_once_both_have_their_part():
    found = shares_of(split(0.5, 0.5), CALM, None, damage(learning_rate=1.0))
    assert found["data"] == pytest.approx(found["learning_rate"])


def test_what_only_both_together_make_is_halved():
    found = shares_of(split(0.2, 0.4, interaction=0.4), CALM, None, damage(learning_rate=1.0))
    assert found["data"] == pytest.approx(0.4)


def test_a_batch_that_is_ordinary_for_calmed_weights_is_excused():
    found = shares_of(split(1.0, 0.0), WILD, Cooldown(before=2.0, after=0.0, steps=12), None)
    assert found["intrinsic"] == 1.0


def test_an_ordinary_batch_cannot_help_what_its_step_did():
    assert first(shares_of(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=False))) == "intrinsic"
    assert first(shares_of(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=True))) == "data"
    with_rate = shares_of(split(0.0, 1.0), CALM, None, damage(data=0.7, learning_rate=0.3, odd=False))
    assert with_rate["learning_rate"] == 1.0


def test_momentum_swung_up_by_steps_that_are_too_long_is_excused():
    assert first(shares_of(split(0.0, 1.0), WILD, None, damage(optimizer=1.0))) == "intrinsic"
    assert first(shares_of(split(0.0, 1.0), CALM, None, damage(optimizer=1.0))) == "optimizer"


def test_a_batch_whose_step_did_damage_is_excused_where_all_steps_are_too_long():
    assert first(shares_of(split(0.0, 1.0), WILD, None, damage(data=1.0, odd=True))) == "intrinsic"
    assert first(shares_of(split(0.0, 1.0), CALM, None, damage(data=1.0, odd=True))) == "data"


def test_where_too_few_updates_say_the_odds_are_even():
    shares = shares_of(split(0.0, 1.0), None, None, damage(optimizer=1.0))
    assert shares["optimizer"] == shares["intrinsic"] == 0.5


def test_nothing_but_long_steps():
    assert only_steps() == dict.fromkeys(Group, 0.0) | {"intrinsic": 1.0}


@pytest.mark.parametrize(("step_size", "expected"), [(CALM, {}), (None, {}), (WILD, only_steps())])
def test_a_jump_within_the_noise_is_nobodys_unless_steps_are_too_long(step_size, expected):
    assert shares_of(split_of("noise", data_effect=1.0), step_size, None, None) == expected


@pytest.mark.parametrize(
    ("kind", "writes", "group"),
    [
        ("weights", (), "outside"),
        ("gradient", (), "outside"),
        ("result", (), "outside"),
        ("modes", (), "outside"),
        ("optimizer", (), "optimizer"),
        ("momentum_or_gradient", ("optimizer",), "optimizer"),
        (None, ("optimizer",), "optimizer"),
        (None, ("weights",), "outside"),
    ],
)
def test_what_came_from_outside_is_the_optimizers_only_in_its_state(kind, writes, group):
    assert outside_shares(outside(kind, writes=writes)) == dict.fromkeys(Group, 0.0) | {group: 1.0}


def test_where_momentum_and_gradient_cannot_be_told_apart_the_odds_are_even():
    found = outside_shares(outside("momentum_or_gradient"))
    assert (found["optimizer"], found["outside"]) == (0.5, 0.5)


def test_an_outside_change_leaves_nothing_to_the_split():
    assert split_verdict(experiments(outside_change=outside("weights"), split=split_of("data"))) is (
        SplitVerdict.NOT_REPRODUCED
    )
    assert split_verdict(experiments()) is None


def test_the_share_of_worsened_updates_decides_between_two_rates():
    assert p_chronic(steps(0)) < 0.02 < p_chronic(steps(2)) < p_chronic(steps(3))
    assert p_chronic(steps(4)) > 0.95
    assert is_chronic(steps(4))
    assert not is_chronic(None)


def test_weights_that_no_single_update_has_ruined_are_the_steps_doing_and_not_the_batchs():
    assert first(shares_of(split(0.2, 0.7), WILD, None, None)) == "intrinsic"
    assert shares_of(split(0.9, 0.05), CALM, None, None)["data"] > 0.95


def test_without_a_cooldown_test_a_batch_is_believed_as_far_as_steps_are_not_too_long():
    doubtful = steps(3)
    shares = shares_of(split(1.0, 0.0), doubtful, None, None)
    assert shares["data"] == pytest.approx(1 - p_chronic(doubtful))
    assert shares["intrinsic"] == pytest.approx(p_chronic(doubtful))
    stands = Cooldown(before=1.0, after=1.0, steps=12)
    assert shares_of(split(1.0, 0.0), doubtful, stands, None)["data"] == 1.0


def test_a_step_made_with_a_changed_computation_is_the_changes_doing():
    found = shares_of(split(0.0, 0.6, computation=0.4), CALM, None, damage(intrinsic=1.0))
    assert found["computation"] == 1.0
    kept = shares_of(split(0.0, 0.9, computation=0.1), CALM, None, damage(intrinsic=1.0))
    assert first(kept) == "intrinsic"
    rate = shares_of(split(0.0, 0.6, computation=0.4), CALM, None, damage(learning_rate=1.0))
    assert rate["learning_rate"] == pytest.approx(0.6)


def test_a_gradient_that_was_turned_has_what_its_step_and_its_momentum_did():
    found = shares_of(split(0.0, 1.0), CALM, None, damage(intrinsic=0.6, optimizer=0.3, learning_rate=0.1), turned=True)
    assert found["gradient"] == pytest.approx(0.9)
    assert found["intrinsic"] == found["optimizer"] == 0.0


@pytest.mark.parametrize("exact", [True, False])
def test_without_an_exact_replay_the_split_has_no_shares(exact):
    found = jump_shares(experiments(replay=replay(exact=exact), split=split(1.0, 0.0), step_size=CALM))
    assert bool(found) is exact


def test_long_steps_of_the_present_explain_what_cannot_be_replayed():
    long = StepSize(rho=0.3, worsened=0.3, against=0.0, overshot=0.3, updates=24, source="present")
    assert jump_shares(experiments(failure="the batch is gone", step_size=long)) == only_steps()
    ordinary = StepSize(rho=0.95, worsened=0.0, against=0.0, overshot=0.0, updates=24, source="present")
    assert jump_shares(experiments(failure="the batch is gone", step_size=ordinary)) == {}


@pytest.mark.parametrize(
    ("rho", "worsened", "against", "overshot", "too_long"),
    [
        pytest.param(0.3, 0.2, 0.0, 0.2, True, id="little-kept"),
        pytest.param(0.8, 0.4, 0.3, 0.1, False, id="carried-by-momentum"),
        pytest.param(0.8, 0.4, 0.1, 0.3, True, id="overshooting"),
        pytest.param(0.5, 0.0, 0.0, 0.0, False, id="never-worse"),
    ],
)
def test_momentum_alone_is_no_step_too_long(rho, worsened, against, overshot, too_long):
    found = StepSize(rho=rho, worsened=worsened, against=against, overshot=overshot, updates=24)
    assert steps_too_long(found) is too_long


def test_a_brisk_rate_is_named_only_where_there_is_trouble():
    brisk = StepSize(rho=0.58, worsened=0.3, against=0.1, overshot=0.2, updates=24)
    assert steps_too_long(brisk)
    assert not steps_too_long_in_quiet_run(brisk)


@pytest.mark.parametrize(
    ("rho", "promised", "against", "error", "direction"),
    [
        (0.9, -1.0, -0.5, 0.1, "ordinary"),
        (-4.0, -1.0, -0.2, 0.1, "too_long"),
        (-4.0, -1.0, 0.3, 0.1, "wrong_direction"),
        (0.9, 1.0, 0.3, 0.1, "wrong_direction"),
        (0.9, -1.0, 0.05, 0.1, "ordinary"),
        (0.2, -1.0, -0.5, 0.1, "unclear"),
        (None, 0.0, None, None, "unclear"),
        (-2.0, -1.0, None, None, "too_long"),
    ],
)
def test_the_direction_of_an_update(rho, promised, against, error, direction):
    found = update(rho=rho, promised=promised, against=against, against_error=error)
    assert update_direction(found) == direction


@pytest.mark.parametrize(
    ("slope", "usual", "direction"),
    [(-1.0, 1.0, "turned"), (-0.3, -0.3, "turned_throughout"), (-1.0, 0.1, "too_long"), (-1.0, None, "too_long")],
)
def test_a_gradient_points_uphill_where_even_a_tiny_step_down_it_raises_the_loss(slope, usual, direction):
    assert update_direction(update(rho=-1.0, slope=slope, slope_usual=usual)) == direction


@pytest.mark.parametrize(("left", "answer"), [(0.0, True), (1.0, False), (math.nan, None)])
def test_the_order_of_samples_is_confirmed_by_what_another_order_leaves(left, answer):
    assert order_confirms(order(left)) is answer


@pytest.mark.parametrize(
    ("share", "level", "confirms"),
    [
        (1.0, "confirms", True),
        (0.5, "confirms", True),
        (0.49, "supports", None),
        (0.25, "supports", None),
        (0.24, "undecided", None),
        (0.11, "undecided", None),
        (0.1, "refutes", False),
        (0.0, "refutes", False),
    ],
)
def test_the_bands_of_a_share(share, level, confirms):
    assert share_level(share) == level
    assert share_confirms(share) is confirms


@pytest.mark.parametrize(
    ("answers", "expected"),
    [((), None), ((None,), None), ((None, True), True), ((False, True), True), ((False, None), False)],
)
def test_one_experiment_confirms_and_refuting_ones_only_without_it(answers, expected):
    assert confirmed(answers) is expected


def test_a_cause_is_tested_by_the_shares_of_all_its_groups():
    found = experiments(
        replay=replay(), split=split(0.5, 0.5), step_size=CALM, attribution=damage(learning_rate=0.6, optimizer=0.4)
    )
    groups = frozenset({Group.LEARNING_RATE, Group.OPTIMIZER})
    assert judgement.tested_share(found, groups) == pytest.approx(0.5, abs=0.01)
    assert judgement.tested_share(found, frozenset()) is None
    assert judgement.tested_share(None, groups) is None


@pytest.mark.parametrize(
    ("verdict", "group", "answer"),
    [
        (SplitVerdict.WEIGHTS, Group.DATA, False),
        (SplitVerdict.DATA, Group.DATA, None),
        (SplitVerdict.DATA, Group.LEARNING_RATE, False),
        (SplitVerdict.BOTH, Group.LEARNING_RATE, None),
    ],
)
def test_a_split_without_shares_refutes_the_other_side_and_confirms_nothing(verdict, group, answer):
    assert split_refutes(verdict, frozenset({group})) is answer


@pytest.mark.parametrize(
    ("phase", "healthy", "answer"), [("input", True, False), ("loss", True, True), ("forward", False, None)]
)
def test_a_first_nonfinite_value_confirms_the_model_only_under_healthy_weights(phase, healthy, answer):
    assert birth_confirms(born(phase, healthy=healthy)) is answer
