"""The sentences about experiments, whole, and what no sentence may contain."""

import dataclasses
import math
import random
import re

import pytest

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.judgement import Group, SplitVerdict, verdict_of
from lightning_spike.experiments import (
    Attribution,
    Cooldown,
    Cost,
    Experiments,
    FactorShare,
    FailedMeasurement,
    FirstNonFinite,
    LossScaleMeasurement,
    ModeMeasurement,
    ModuleActivity,
    ModuleChange,
    ModuleMeasurement,
    OutsideChange,
    OutsideWrite,
    PrecisionMeasurement,
    Remedy,
    Replay,
    SampleExchange,
    SampleMeasurement,
    SampleOrder,
    Split,
    StepSize,
    TensorDifference,
    UpdateMeasurement,
)

NAN, INF = math.nan, math.inf


def factor(name, share, error=0.06, group="optimizer"):
    return FactorShare(factor=name, group=group, share=share, error=error)


def made(record, defaults, changes):
    return record(**(defaults | changes))


def an_attribution(**changes):
    defaults = {
        "ordinal": 345, "step": 345, "updates": 1, "damage": math.log(2.02), "finer": (), "odd_batch": True,
        "intrinsic": 0.0,
        "shares": (factor("learning_rate", 1.0, group="learning_rate"),),
        "at_baseline": ("batch", "optimizer_state", "clipping"),
    }  # fmt: skip
    return made(Attribution, defaults, changes)


def a_split(**changes):
    defaults = {
        "jump": 1.4, "data_effect": 0.0, "weights_effect": 1.3, "interaction_effect": 0.0, "computation_effect": 0.0,
        "weights_error": 0.05, "excess": 0.1, "noise": 0.1, "controls": 8, "batch_loss": (2.4, 9.13),
        "control_loss": (2.3, 8.0),
    }  # fmt: skip
    return made(Split, defaults, changes)


def a_replay(**changes):
    defaults = {"batches": 24, "recorded": 9.13, "replayed": 9.13, "differs_at": None}
    return made(Replay, defaults, changes)


def some_steps(**changes):
    return made(StepSize, {"rho": 0.2, "worsened": 0.25, "against": 0.0, "overshot": 0.25, "updates": 12}, changes)


def an_update(**changes):
    defaults = {
        "ordinal": 345, "step": 1345, "tensor": "head.weight", "rms": 5.123, "rms_usual": 1.1, "cosine": -0.45,
        "cosine_usual": 0.3,
        "length": 3.2, "relative_length": 0.0123, "length_usual": 1.0, "promised": -1.0, "rho": -2.0, "slope": 1.0,
        "slope_usual": None,
        "against": -0.1, "against_error": 0.01,
    }  # fmt: skip
    return made(UpdateMeasurement, defaults, changes)


def activity(**changes):
    defaults = {"largest": 4.0, "rms": 1.0, "zeros": 0.4, "saturated": None, "gradient": 1.2}
    return made(ModuleActivity, defaults, changes)


def a_module(name, kind="Linear", *, factor=1.0, usual=None, **now):
    return ModuleChange(module=name, kind=kind, now=activity(**now), usual=usual or activity(), factor=factor)


def some_samples(**changes):
    defaults = {
        "losses": (2.0, 9.1, 2.2), "usual_losses": (2.1, 2.2, 2.0), "gradient_bounds": None,
        "usual_gradient_bounds": None,
        "hardest": (1, 2), "gradients": (31.0, 2.0), "usual_gradient": 1.2,
    }  # fmt: skip
    return made(SampleMeasurement, defaults, changes)


def a_change(**changes):
    return made(OutsideChange, {"ordinal": 7, "step": 1345, "kind": "weights"}, changes)


# -- numbers and lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"), (NAN, "NaN"), (INF, "Inf"), (-INF, "-Inf"), (0.0, "0"), (2.345, "2.35"),
        (-0.0312, "-0.0312"),
        (999.9, "1,000"), (48_210.0, "48,200"), (1.35e-5, "1.35e-05"), (3.456e12, "3.46e12"), (-1234.0, "-1,230"),
    ],
)  # fmt: skip
def test_a_number_has_three_digits(value, text):
    assert sentences.number(value) == text


def test_factors_percentages_and_lists():
    assert [sentences.times(x) for x in (2.021, 48_210.0, 0.5, INF)] == ["×2.02", "×48,000", "×0.5", "×Inf"]
    assert sentences.times(NAN) == "by an unknown factor"
    assert [sentences.percent(x) for x in (0.0, 0.001, 0.62, 0.999, 1.0)] == ["0 %", "<1 %", "62 %", ">99 %", "100 %"]
    assert sentences.percent(-0.002) == "0 %"
    assert sentences.percent(NAN) == "an unknown share"
    assert [sentences.listed(list(x)) for x in ("", "a", "ab", "abc")] == ["nothing", "a", "a and b", "a, b and c"]


# -- replay and split -------------------------------------------------------------------------------------------------


def test_the_replay():
    exact = "Replay of the 24 batches from the last healthy snapshot to the onset: every recorded loss is reproduced."
    assert sentences.replay(a_replay()) == exact
    assert "the 1 batch from" in sentences.replay(a_replay(batches=1))
    differs = a_replay(replayed=2.31, differs_at=7, failure="the replay differs from batch 7 on.")
    assert sentences.replay(differs) == (
        "Replay of the 24 batches from the last healthy snapshot to the onset is not exact: "
        "the replay differs from batch 7 on. "
        "The batch at the onset has loss 2.31 instead of 9.13."
    )
    assert sentences.replay(a_replay(replayed=None, failure="out of memory")).endswith("is not exact: out of memory.")


def test_the_split_says_the_verdict_first_and_then_the_losses():
    assert sentences.split(a_split(), SplitVerdict.WEIGHTS) == (
        "Replay: the weights cause the jump, whatever the batch. "
        "Loss under the snapshot's weights and at the onset: this batch 2.4 → 9.13, 8 control batches 2.3 → 8 (median)."
    )


def test_a_split_with_one_control_batch_has_no_median():
    text = sentences.split(a_split(controls=1), SplitVerdict.DATA)
    assert text.endswith("this batch 2.4 → 9.13, 1 control batch 2.3 → 8.")


def test_a_split_without_an_exact_replay():
    assert sentences.split(a_split(new_weights_are_later=True), SplitVerdict.DATA) == (
        "Without an exact replay: the batch itself causes the jump, not the weights. "
        "This batch: loss 2.4 under the snapshot's weights, 9.13 in the training. "
        "8 control batches: 2.3 under the snapshot's weights, 8 under later weights (median)."
    )


def test_a_changed_computation_is_compared_with_what_the_training_recorded():
    changed = a_split(control_loss=(5.0, NAN), recorded_control_loss=2.3)
    assert sentences.split(changed, SplitVerdict.COMPUTATION) == (
        "Replay: the same batches and weights now give a higher loss than before. "
        "Under the snapshot's weights 8 control batches now have loss 5 (median); the training recorded 2.3."
    )
    alone = dataclasses.replace(changed, controls=1, recorded_control_loss=None)
    assert sentences.split(alone, SplitVerdict.COMPUTATION).endswith("1 control batch now has loss 5.")


def test_within_noise_there_is_no_share():
    quiet = a_split(jump=0.05, weights_effect=0.01)
    found = Experiments(episode=1, replay=a_replay(), split=quiet)
    assert verdict_of(quiet) is SplitVerdict.NOISE
    assert sentences.jump(found).startswith("Replay: the jump is within the noise between batches. Loss under")
    assert "%" not in " ".join(sentences.about(found))


# -- non-finite values and changes from outside -----------------------------------------------------------------------


def nonfinite(phase, module, operation, **more):
    return sentences.first_nonfinite(FirstNonFinite(phase=phase, module=module, operation=operation, **more))


def test_the_first_nonfinite_value():
    assert (
        nonfinite("input", None, "batch['x']", count=1) == "The batch itself contains 1 NaN or Inf value in batch['x']."
    )
    assert nonfinite("input", None, None) == "The batch itself contains NaN or Inf values."
    assert nonfinite("forward", "net.0", "log", with_healthy_weights=False) == (
        "The first NaN or Inf appears in the forward pass, in module 'net.0', operation 'log'; its inputs are finite. "
        "With the snapshot's weights the same batch stays finite."
    )
    assert nonfinite("loss", None, None) == (
        "The first NaN or Inf appears in the loss computation, in training_step; its inputs are finite."
    )
    assert nonfinite("backward", "", "SqrtBackward0") == (
        "The loss is finite; the first NaN or Inf appears in the backward pass, "
        "in training_step, operation 'SqrtBackward0'."
    )


def tensor(name, relative):
    return TensorDifference(name=name, kind="weights", relative=relative, elements=4, changed=4, powers_of_two=0)


def test_an_outside_change_names_three_tensors_and_counts_the_others():
    names = ("a", "b", "c", "d", "e")
    change = a_change(
        writes=(OutsideWrite(ordinal=6, kind="weights", names=names),), different=(tensor("a", 0.5), tensor("b", INF)),
        loss_with_change=9.13, repaired=0.98,
    )  # fmt: skip
    assert sentences.outside_change(change) == (
        "Something outside the training step changed the weights at step 1,345. "
        "Code outside the training step wrote into 'a', 'b', 'c' and 2 others. "
        "Largest relative differences between training and replay: 'a' 0.5 and 'b' (no finite ratio). "
        "A replay with only this change gives loss 9.13. Without the change 98 % of the jump disappears."
    )


def test_an_outside_change_of_which_nothing_is_known():
    text = sentences.outside_change(a_change(step=None, kind=None, repaired=NAN))
    assert text == "Something that the replay does not repeat made the loss jump."


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("",), "From step 1,345 on the whole module is in eval mode."),
        ((), "From step 1,345 on all modules are in train mode."),
        (("bn",), "From step 1,345 on 'bn' is in eval mode."),
        (("a", "b", "c", "d"), "From step 1,345 on 'a', 'b', 'c' and 1 other are in eval mode."),
        (None, "From step 1,345 on modules are in another mode (train or eval) than before."),
    ],
)
def test_changed_modes(names, text):
    assert sentences.outside_change(a_change(kind="modes", eval_modules=names)) == text


# -- step size and cooldown -------------------------------------------------------------------------------------------


def test_the_step_size():
    assert sentences.step_size(some_steps()) == (
        "Step-size test in the replay: the steps are too long for the loss surface. "
        "3 of 12 updates raised the loss of their own batch (healthy runs: 2 %). "
        "The median loss change is 0.2 times what the gradient promised (healthy runs: 0.8 to 1)."
    )
    assert "the steps have an ordinary length" in sentences.step_size(some_steps(rho=0.9, worsened=0.0, overshot=0.0))
    undecided = sentences.step_size(some_steps(rho=NAN, worsened=1.0, updates=1))
    assert undecided == (
        "Step-size test in the replay: whether the steps are too long is undecided. "
        "1 of 1 update raised the loss of its own batch (healthy runs: 2 %)."
    )
    assert sentences.step_size(some_steps(worsened=NAN)) == "Step-size test in the replay: no update could be tested."


def test_step_size_tests_that_take_the_place_of_a_replay():
    present = sentences.step_size(some_steps(source="present"))
    earlier = sentences.step_size(some_steps(source="earlier", at_step=1200))
    assert present.startswith("Step-size test on the present weights: the steps are too long for the loss surface.")
    assert earlier.startswith("Step-size test at step 1,200, before the episode: the steps are too long")
    assert sentences.step_size(some_steps(source="earlier")).startswith("Step-size test, before the episode: the")


def test_the_cooldown():
    assert sentences.cooldown(Cooldown(before=2.0, after=1.8, steps=1)) == (
        "Cooldown test: the batch itself is abnormal. "
        "After 1 update with a tenth of the learning rate, 90 % of the batch's excess loss remains."
    )
    calmer = sentences.cooldown(Cooldown(before=2.0, after=0.1, steps=12))
    assert calmer.startswith(
        "Cooldown test: the weights cause the excess loss, because the steps are too long. After 12 up"
    )
    assert sentences.cooldown(Cooldown(before=0.0, after=1.0, steps=3)).endswith("no excess loss over control batches.")
    assert sentences.cooldown(Cooldown(before=1.0, after=NAN, steps=3)).endswith(
        "no finite loss, so it decides nothing."
    )


# -- attribution, shares, remedies ------------------------------------------------------------------------------------


def test_one_factor_explains_the_damage():
    assert sentences.attribution(an_attribution()) == (
        "Replay: the update at step 345 raised the loss on control batches (×2.02). "
        "With the previous learning rate the increase disappears (100 % ± 6 %). "
        "Other factors tested: batch, optimizer state, clipping: no effect."
    )


def test_several_factors_a_remainder_and_a_closer_look():
    found = an_attribution(
        shares=(factor("optimizer_state", 0.62), factor("samples", 0.3, NAN), factor("clipping", 0.02),
                factor("epsilon", -0.2)),
        finer=(factor("momentum", 0.5), factor("second_moments", 0.05)),
        intrinsic=0.26, updates=3, odd_batch=False, at_baseline=("learning_rate",),
    )  # fmt: skip
    assert sentences.attribution(found) == (
        "Replay: the 3 updates from step 345 on raised the loss on control batches (×2.02). "
        "The increase is due to the optimizer state (62 % ± 6 %) and the outlier samples (30 %). "
        "The epsilon made the increase smaller (20 % ± 6 %). In detail: the momentum (50 % ± 6 %). "
        "With every factor at its usual value, 26 % of the increase remains. "
        "Other factors tested: clipping, learning rate: no effect. "
        "The batches of these updates had ordinary losses before them."
    )


def test_no_factor_explains_the_damage():
    found = an_attribution(shares=(factor("batch", 0.03),), intrinsic=0.97, odd_batch=False, at_baseline=())
    assert sentences.attribution(found) == (
        "Replay: the update at step 345 raised the loss on control batches (×2.02). "
        "No tested factor explains the increase. With every factor at its usual value, 97 % of the increase remains. "
        "Factors tested: batch: no effect. The batch of this update had an ordinary loss before it."
    )


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (NAN, "made the loss on control batches non-finite"), (INF, "made the loss on control batches non-finite"),
        (math.log(48_210), "raised the loss on control batches (×48,000)"),
        (0.04, "raised the loss on control batches by 4 %"),
    ],
)  # fmt: skip
def test_the_size_of_the_damage(damage, text):
    assert sentences.attribution(an_attribution(damage=damage)).startswith(f"Replay: the update at step 345 {text}.")


def test_without_damage_there_are_no_shares():
    text = sentences.attribution(an_attribution(damage=-0.1))
    assert text == "Replay: the update at step 345 did not raise the loss on control batches."


def test_losses_that_can_be_negative_have_a_difference_and_no_factor():
    found = an_attribution(damage=3.2)
    assert "raised the loss on control batches by 3.2." in sentences.attribution(found, in_logs=False)
    split = a_split(batch_loss=(-1.0, 4.0))
    assert "batches by 3.2." in sentences.jump(
        Experiments(episode=1, replay=a_replay(), split=split, attribution=found)
    )


def test_shares_of_the_jump():
    many = {Group.DATA: 0.2, Group.LEARNING_RATE: 0.78, Group.OUTSIDE: 0.02}
    assert sentences.shares(many) == "The jump is due to the learning rate (78 %) and the batch (20 %)."
    unknown = "The experiments do not show what the jump is due to."
    assert sentences.shares({}) == sentences.shares({Group.DATA: NAN}) == unknown


def test_remedies_are_no_evidence_of_the_cause():
    tried = [
        Remedy(remedy="lower_rate", value=0.1, repaired=1.3),
        Remedy(remedy="clip", value=0.51234, repaired=0.4),
        Remedy(remedy="reset_state", value=None, repaired=-2.0),
        Remedy(remedy="float32", value=None, repaired=NAN),
    ]
    assert sentences.remedies(tried) == (
        "Would have helped: the learning rate ×0.1 (damage −100 %) and gradient clipping at norm 0.512 (−40 %). "
        "This is a remedy, not evidence of the cause."
    )
    assert sentences.remedies(tried[2:]) == "No tested remedy would have helped at this update."
    assert sentences.remedies([]) == ""
    assert "a lower learning rate (damage −50 %)" in sentences.remedies(
        [Remedy(remedy="lower_rate", value=None, repaired=0.5)]
    )


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_few_samples_carry_the_loss():
    one = SampleExchange(positions=(7,), samples=32, loss=9.13, without=2.3, left=0.05)
    assert sentences.sample_exchange(one) == (
        "1 outlier sample of 32 causes the batch's high loss (position 7). "
        "With an ordinary sample in its place the loss is 2.3 instead of 9.13; 95 % of the excess disappears."
    )
    many = SampleExchange(positions=tuple(range(10)), samples=32, loss=INF, without=9.0, left=0.9)
    assert sentences.sample_exchange(many) == (
        "10 outlier samples of 32 alone do not cause the batch's high loss "
        "(positions 0, 1, 2, 3, 4, 5, 6, 7 and 2 others). "
        "With ordinary samples in their place the loss is 9 instead of Inf; 10 % of the excess disappears."
    )


def test_the_order_of_the_samples():
    order = SampleOrder(batches=12, usual=2.2, loss=4.8, shuffled=2.4, left=0.08)
    assert sentences.sample_order(order) == (
        "The order of the samples causes the high losses. With the samples of the last 12 batches reshuffled, "
        "the mean loss is 2.4 instead of 4.8 (before: 2.2); 92 % of the excess disappears."
    )
    anyway = sentences.sample_order(dataclasses.replace(order, left=1.0, usual=NAN))
    assert anyway.startswith("The samples cause the high losses in any order.")
    assert anyway.endswith("the mean loss is 2.4 instead of 4.8; 0 % of the excess disappears.")


def test_samples_one_by_one():
    assert sentences.samples(some_samples()) == (
        "Sample losses under healthy weights: median 2.2 (ordinary batch: 2.1), highest 9.1 at position 1. "
        "The sample at position 1 has a gradient norm of 31 (ordinary sample: 1.2)."
    )
    broken = sentences.samples(some_samples(losses=(2.0, NAN), usual_losses=(NAN,), gradients=(), hardest=()))
    assert broken == (
        "Sample losses under healthy weights: median 2 (ordinary batch: unknown), highest NaN at position 1."
    )
    assert sentences.samples(some_samples(losses=(), hardest=())) == "No single sample could be measured."


# -- single measurements ----------------------------------------------------------------------------------------------


def test_the_modules():
    grown = a_module("net.0", factor=5.1, rms=5.1, largest=30.0)
    steep = a_module("net.4", factor=26.0, gradient=31.2)
    dead = a_module("net.1", "ReLU", zeros=0.98)
    flat = a_module("", "Gate", saturated=0.6)
    assert sentences.modules(ModuleMeasurement(modules=(grown, dead, flat, steep))) == (
        "The first module with abnormal outputs is 'net.0' (Linear): RMS 5.1 (usually 1), largest 30 (usually 4). "
        "The module that changed most is 'net.4' (Linear): gradient norm 31.2 (usually 1.2). "
        "98 % of the outputs of 'net.1' (ReLU) are zero (usually 40 %). "
        "60 % of the outputs of the LightningModule (Gate) are saturated (usually 0 %)."
    )


def test_modules_without_a_change():
    quiet = ModuleMeasurement(modules=(a_module("a", factor=2.1), a_module("b", factor=1.2)))
    assert sentences.modules(quiet) == "No module's activations or gradients changed by more than ×2.1."
    assert sentences.modules(ModuleMeasurement(modules=())) == "No module's activations could be measured."
    broken = a_module("a", factor=INF, gradient=None)
    assert sentences.modules(ModuleMeasurement(modules=(broken,))) == (
        "The module that changed most is 'a' (Linear): its values are non-finite."
    )


def test_the_update():
    assert sentences.update(an_update()) == (
        "The update at step 1,345 was too long: it followed its gradient, but its own batch's loss rose. "
        "The update changed the weights by 0.0123 of their norm (×3.2 the usual length). "
        "The gradient of 'head.weight' is 5.12 times its second-moment estimate (usually 1.1). "
        "The cosine between momentum and gradient is -0.45 (usually 0.3)."
    )
    bare = an_update(tensor=None, rms=None, cosine=None, length_usual=None, rho=None, against=None)
    assert sentences.update(bare) == (
        "The update at step 1,345 was neither clearly too long nor clearly in a wrong direction. "
        "The update changed the weights by 0.0123 of their norm."
    )
    broken = sentences.update(an_update(relative_length=NAN, rms=INF, rms_usual=NAN, cosine=NAN))
    assert broken.endswith(
        "The change of the weights is non-finite. "
        "The gradient of 'head.weight' is without finite ratio to its second-moment estimate."
    )


def test_a_gradient_that_points_uphill():
    text = sentences.update(an_update(slope=-0.5, slope_usual=1.0))
    assert text.startswith(
        "The gradient at step 1,345 points uphill: even a tiny step down it raises its own batch's loss. "
        "Earlier in the replay this was not so."
    )


def precision(low, float32):
    return sentences.precision(PrecisionMeasurement(precision="bf16-mixed", low=low, float32=float32))


def test_the_precision():
    assert precision(2.4, 2.3) == (
        "The loss is 2.4 in bf16-mixed and 2.3 in float32. The difference is 4 %; rounding alone makes up to 5 %."
    )
    assert precision(2.3, 2.3) == "The loss is 2.3 in bf16-mixed and 2.3 in float32: low precision makes no difference."
    assert precision(NAN, 2.3).endswith(
        "NaN in bf16-mixed and 2.3 in float32: low precision causes the non-finite loss."
    )
    assert precision(INF, NAN).endswith("and NaN in float32: low precision is not the cause.")
    assert precision(2.3, NAN).endswith("2.3 in bf16-mixed and NaN in float32.")


def a_mode(train, in_eval, before=(None, None), frozen=()):
    usual_train, usual_eval = before
    found = ModeMeasurement(train=train, eval=in_eval, usual_train=usual_train, usual_eval=usual_eval, frozen=frozen)
    return sentences.modes(found)


def test_train_and_eval_mode():
    assert a_mode(2.3, 9.1, (2.2, 2.4)) == (
        "Eval mode became worse than train mode: running statistics no longer fit the weights. "
        "A control batch has loss 2.3 in train mode and 9.1 in eval mode (before: 2.2 and 2.4)."
    )
    assert a_mode(9.1, 2.3, (2.2, 2.4)).startswith(
        "Train mode became worse than eval mode: only train mode uses dropout"
    )
    assert a_mode(2.3, 2.4, (2.2, 2.4)).startswith("A control batch has loss 2.3 in train mode")
    assert a_mode(2.3, 2.3, frozen=("",)) == (
        "Train and eval mode give the same loss on a control batch: 2.3. "
        "The whole module is in eval mode during training."
    )
    assert a_mode(NAN, 2.3, frozen=("bn",)) == (
        "A control batch has loss NaN in train mode and 2.3 in eval mode. 'bn' is in eval mode during training."
    )


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        (65536.0, 65536.0, "The loss scale stayed at 65,500: no gradient overflowed."),
        (32768.0, 65536.0, "The loss scale rose from 32,800 to 65,500."),
        (1024.0, 512.0, "The loss scale fell from 1,020 to 512: gradients overflowed, and their updates were skipped."),
        (NAN, 2.0, "The loss scale changed from NaN to 2."),
    ],
)
def test_the_loss_scale(before, now, text):
    assert sentences.loss_scale(LossScaleMeasurement(before=before, now=now)) == text


def test_a_loss_scale_below_one():
    text = sentences.loss_scale(LossScaleMeasurement(before=1.0, now=0.5))
    assert text.endswith("were skipped. Below 1 it makes gradients smaller than they are.")


def test_what_failed_and_what_was_left_out():
    failed = FailedMeasurement(measurement="sample_order", error="RuntimeError: boom.")
    assert sentences.failed(failed) == "The measurement of sample order failed: RuntimeError: boom."
    assert sentences.cost(Cost(steps=30, updates=20, worth=24.3)) == ""
    assert sentences.cost(Cost(steps=30, updates=20, worth=24.3, left_out=("cooldown", "remedies"))) == (
        "Not tested, because the budget was used up: cooldown; remedies. "
        "The examination took the time of 24.3 training steps."
    )
    left = Cost(steps=30, updates=20, worth=NAN, left_out=("cooldown",))
    assert sentences.cost(left) == "Not tested, because the budget was used up: cooldown."


# -- a whole examination ----------------------------------------------------------------------------------------------


def test_the_jump_is_told_by_the_attribution_first_then_the_cooldown_then_the_split():
    found = Experiments(
        episode=1, replay=a_replay(), split=a_split(), attribution=an_attribution(),
        cooldown=Cooldown(before=1.0, after=1.0, steps=4),
    )  # fmt: skip
    assert sentences.jump(found) == (
        f"{sentences.attribution(an_attribution())} The jump is due to the learning rate (100 %)."
    )
    cooled = dataclasses.replace(found, attribution=None)
    assert sentences.jump(cooled).startswith("Cooldown test: the batch itself is abnormal.")
    bare = dataclasses.replace(cooled, cooldown=None)
    assert sentences.jump(bare).startswith("Replay: the weights cause the jump, whatever the batch.")
    assert sentences.jump(Experiments(episode=1)) == ""


def test_the_jump_of_an_outside_change_has_no_shares():
    assert sentences.jump(Experiments(episode=1, outside_change=a_change())) == (
        "Something outside the training step changed the weights at step 1,345."
    )


def test_long_steps_explain_an_episode_without_a_replay_and_a_jump_within_noise():
    steps = some_steps(source="earlier", at_step=120)
    found = Experiments(episode=1, failure="the snapshot is gone", step_size=steps)
    assert sentences.jump(found) == f"{sentences.step_size(steps)} These steps explain the episode."
    assert sentences.about(found) == (
        "The onset could not be replayed: the snapshot is gone.",
        sentences.step_size(steps),
        "These steps explain the episode.",
    )
    quiet = a_split(jump=0.05, weights_effect=0.01)
    noisy = Experiments(episode=1, replay=a_replay(), split=quiet, step_size=some_steps())
    assert sentences.jump(noisy).startswith("Step-size test in the replay: the steps are too long")


def test_about_an_examination_in_reading_order():
    found = Experiments(
        episode=1, rank=3, world_size=8, replay=a_replay(), split=a_split(), attribution=an_attribution(),
        first_nonfinite=FirstNonFinite(phase="forward", module="a", operation="log", rank=2),
        modules=ModuleMeasurement(modules=(), rank=3), remedies=(Remedy(remedy="float32", value=None, repaired=0.0),),
        samples=some_samples(rank=0, losses=(), hardest=()),
        failed=(FailedMeasurement(measurement="modes", error="x"),),
        cost=Cost(steps=1, updates=1, worth=1.0),
    )  # fmt: skip
    told = sentences.about(found)
    assert [text.split(":")[0] for text in told] == [
        "Replay of the 24 batches from the last healthy snapshot to the onset",
        "Rank 2",
        "Replay",
        "Replay",
        "The jump is due to the learning rate (100 %).",
        "No tested remedy would have helped at this update.",
        "Rank 3",
        "Rank 0",
        "The measurement of modes failed",
    ]
    assert told[2].endswith("Losses are means over 8 ranks; rank 3 saw the jump.")


def test_an_episode_that_was_not_examined_has_its_reason_alone():
    found = Experiments(episode=1, not_run="the batch is gone.", split=a_split())
    assert sentences.about(found) == ("Not examined: the batch is gone.",)


def test_the_remark_of_another_rank():
    found = Experiments(episode=1, rank=3, not_run="the batch is gone")
    assert sentences.remark_of_other_rank(found, "spike", 1345) == (
        "Rank 3 saw a spike at step 1,345; this rank's loss did not show it. Not examined: the batch is gone."
    )
    unknown = Experiments(episode=1, split=a_split(), replay=a_replay())
    text = sentences.remark_of_other_rank(unknown, "nonfinite", 7)
    assert text.startswith(
        "Another rank saw a non-finite loss at step 7; this rank's loss did not show it. Replay: the"
    )
    assert "saw an oscillation at step 7;" in sentences.remark_of_other_rank(unknown, "oscillation", 7)


# -- what no sentence contains ----------------------------------------------------------------------------------------

FORBIDDEN = re.compile(r"nan|inf|None|e\+|\b(told|tells?|borne|lone|whose|again|as usual)\b|--|  |\.\.|%%")
WORDS = 25


def random_number(draw, *, low=0.0):
    special = draw.random() < 0.2
    value = draw.choice([NAN, INF, 0.0, 1.0, 1e30, 1e-30]) if special else math.exp(draw.gauss(0.0, 4.0))
    return max(value, low) * (1 if low >= 0 else draw.choice([1, -1]))


def random_share(draw):
    return draw.choice([NAN, 0.0, 1.0, -0.4, draw.random(), draw.random(), draw.random()])


def random_names(draw):
    return tuple(f"layers.{k}.weight" for k in range(draw.randrange(7)))


def random_split(draw):
    effects = [abs(draw.gauss(0.0, 1.0)) for _ in range(8)]
    fields = (
        "jump",
        "data_effect",
        "weights_effect",
        "interaction_effect",
        "computation_effect",
        "weights_error",
        "excess",
        "noise",
    )
    losses = [random_number(draw, low=-1.0) for _ in range(5)]
    return Split(
        **dict(zip(fields, effects, strict=True)), controls=draw.randrange(1, 12), batch_loss=(losses[0], losses[1]),
        control_loss=(losses[2], losses[3]), recorded_control_loss=draw.choice([None, losses[4]]),
        new_weights_are_later=draw.random() < 0.3,
    )  # fmt: skip


def random_factors(draw):
    names = draw.sample([*sentences.FACTORS, "own_factor"], draw.randrange(10))
    groups = ["data", "learning_rate", "clipping", "optimizer", "numerics"]
    return tuple(factor(n, random_share(draw) * 1.2, draw.choice([NAN, 0.05]), draw.choice(groups)) for n in names)


def random_attribution(draw):
    return an_attribution(
        updates=draw.randrange(1, 5), damage=random_number(draw, low=-1.0), shares=random_factors(draw),
        finer=random_factors(draw),
        odd_batch=draw.random() < 0.5, intrinsic=random_share(draw),
        at_baseline=tuple(draw.sample(list(sentences.FACTORS), 4)),
    )  # fmt: skip


def random_steps(draw):
    return some_steps(
        rho=draw.choice([NAN, draw.gauss(0.5, 1.0)]), worsened=draw.random(), overshot=draw.random(),
        updates=draw.randrange(40),
        source=draw.choice(["replay", "present", "earlier"]), at_step=draw.choice([None, 12_345]),
    )  # fmt: skip


def random_change(draw):
    tensors = tuple(tensor(name, random_number(draw)) for name in random_names(draw))
    return a_change(
        step=draw.choice([None, 12_345]), kind=draw.choice([*sentences.CHANGES, "modes"]), different=tensors,
        writes=(OutsideWrite(ordinal=1, kind="weights", names=random_names(draw)),),
        eval_modules=draw.choice([None, ("",), random_names(draw)]),
        loss_with_change=draw.choice([None, random_number(draw)]), repaired=draw.choice([None, random_share(draw)]),
    )  # fmt: skip


def random_activity(draw):
    rms, largest, gradient = (random_number(draw) for _ in range(3))
    return activity(
        rms=rms, largest=largest, gradient=draw.choice([None, gradient]), zeros=draw.random(),
        saturated=draw.choice([None, draw.random()]),
    )  # fmt: skip


def random_modules(draw):
    return ModuleMeasurement(
        rank=draw.choice([None, 3]),
        modules=tuple(
            ModuleChange(
                module=name, kind="ReLU", factor=1.0 + random_number(draw), now=random_activity(draw),
                usual=random_activity(draw)
            )
            for name in random_names(draw)
        ),
    )  # fmt: skip


def random_update(draw):
    names = (
        "rms",
        "rms_usual",
        "cosine",
        "cosine_usual",
        "length_usual",
        "rho",
        "slope",
        "slope_usual",
        "against",
        "against_error",
    )
    values = {name: draw.choice([None, random_number(draw, low=-1.0)]) for name in names}
    return an_update(
        **values, length=random_number(draw), relative_length=random_number(draw), promised=draw.gauss(0, 1)
    )


def random_samples(draw):
    losses = tuple(random_number(draw) for _ in range(draw.randrange(5)))
    return some_samples(
        losses=losses, usual_losses=losses[1:], hardest=tuple(range(len(losses))), gradients=losses,
        usual_gradient=random_number(draw), rank=draw.choice([None, 1]),
    )  # fmt: skip


def random_measurements(draw):
    losses = [random_number(draw, low=-1.0) for _ in range(6)]
    usual = draw.choice([(None, None), (losses[2], losses[3])])
    return {
        "modules": random_modules(draw), "update": random_update(draw), "samples": random_samples(draw),
        "precision": PrecisionMeasurement(precision="16-mixed", low=losses[0], float32=losses[1]),
        "modes": ModeMeasurement(
            train=losses[0], eval=losses[1], usual_train=usual[0], usual_eval=usual[1], frozen=random_names(draw)
        ),
        "loss_scale": LossScaleMeasurement(before=losses[4], now=losses[5]),
        "sample_exchange": SampleExchange(
            positions=tuple(range(1, draw.randrange(2, 20))), samples=4096, loss=losses[0], without=losses[1],
            left=random_share(draw)
        ),
        "sample_order": SampleOrder(
            batches=12, usual=losses[0], loss=losses[1], shuffled=losses[2], left=random_share(draw)
        ),
        "remedies": tuple(
            Remedy(remedy=r, value=draw.choice([None, random_number(draw)]), repaired=random_share(draw))
            for r in ("lower_rate", "clip", "reset_state", "float32")
        ),
    }  # fmt: skip


def random_experiments(seed):
    draw = random.Random(seed)  # noqa: S311 - no secret
    replay = a_replay(
        recorded=random_number(draw), replayed=draw.choice([None, random_number(draw)]), batches=draw.randrange(1, 40),
        failure=draw.choice([None, None, "some losses differ"]),
    )  # fmt: skip
    nonfinite = FirstNonFinite(
        phase=draw.choice(["input", "forward", "loss", "backward"]), module=draw.choice([None, "", "net.0"]),
        rank=draw.choice([None, 2]),
        operation=draw.choice([None, "log"]), count=draw.choice([None, 1, 12]),
        with_healthy_weights=draw.random() < 0.5,
    )  # fmt: skip
    cooled = Cooldown(before=random_number(draw, low=-1.0), after=random_number(draw), steps=draw.randrange(1, 9))
    fields = random_measurements(draw) | {
        "replay": replay, "split": random_split(draw), "first_nonfinite": nonfinite, "step_size": random_steps(draw),
        "cooldown": cooled, "attribution": random_attribution(draw), "rank": draw.choice([None, 1]),
        "world_size": draw.choice([1, 4]),
        "cost": Cost(steps=9, updates=4, worth=random_number(draw), left_out=("remedies",)),
        "failed": (FailedMeasurement(measurement="sample_order", error="RuntimeError: boom"),),
    }  # fmt: skip
    kept = {name: value for name, value in fields.items() if draw.random() < 0.7}
    change = random_change(draw) if draw.random() < 0.2 else None
    return Experiments(episode=1, outside_change=change, **kept)


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w|[×→]", word)]


def texts_about(found):
    texts = [*sentences.about(found), sentences.jump(found), sentences.remark_of_other_rank(found, "stall", 7)]
    if found.split is not None:
        texts += [sentences.split(found.split, verdict) for verdict in SplitVerdict]
    return [text for text in texts if text]


def test_no_sentence_is_long_or_shows_a_raw_number():
    for text in (text for seed in range(1500) for text in texts_about(random_experiments(seed))):
        assert text.endswith("."), text
        assert not FORBIDDEN.search(text), text
        for sentence in re.split(r"(?<=\.) (?=[A-Z0-9'<>])", text):
            assert len(words(sentence)) <= WORDS, sentence


def test_every_random_number_has_at_most_three_digits_or_is_whole_and_short():
    draw = random.Random(0)  # noqa: S311 - no secret
    for _ in range(2000):
        text = sentences.number(random_number(draw, low=-1.0))
        mantissa = text.split("e")[0].replace(",", "").replace(".", "").strip("-0")
        assert text in {"NaN", "Inf", "-Inf"} or len(mantissa) <= 3, text
