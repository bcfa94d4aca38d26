"""Every first cause against its own fault and against the faults of the others, on runs made of numbers, with decoys
beside the fault."""

import dataclasses
import json

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import ADAMW, SGD, WARM_RESTARTS, Run, an_episode, moment

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Action, EpisodeKind, Finding, Recovery, ValidationPoint

SGD_RESTARTS = dataclasses.replace(WARM_RESTARTS, optimizer="SGD")


def bad_batch(seed, decoys):
    run = Run(seed, optimizer=SGD)
    run.odd_batch(200, 40)
    run.bump(200, 12, 6)
    run.bump_gradient(200, 8, 4)
    if decoys:
        run.rate[195:] *= 1.3
        run.bump_gradient(180, 1.5, 3)
    return run, [an_episode(200, 200, 215, height=run.loss[200], before=0.35)]


def nonfinite_input(seed, decoys):
    run = Run(seed)
    run.nonfinite[200] = 3
    run.loss[200:] = np.nan
    run.grad[200:] = np.nan
    for series in (run.max_abs, run.std, run.mean):
        series[200] = np.nan
    if decoys:
        run.rate[195:] *= 1.3
        run.odd_batch(199, 1.5)
    return run, [an_episode(200, kind=EpisodeKind.NONFINITE, height=np.nan, recovery=Recovery.NEVER, severity=99.0)]


def lr_restart(seed, decoys):
    run = Run(seed, optimizer=SGD, schedulers=(SGD_RESTARTS,))
    run.restarts(100)
    run.bump(201, 9, 15)
    run.bump_gradient(200, 12, 15)
    if decoys:
        run.odd_batch(201, 1.5)
    return run, [an_episode(201, 202, 240, height=3.0, before=0.35)]


def lr_scheduler_fault(seed, decoys):
    run = Run(seed)
    run.rate[200:] = 0.3
    run.bump(202, 9, 30)
    run.bump_gradient(201, 12, 30)
    if decoys:
        run.odd_batch(202, 1.5)
    return run, [an_episode(202, 203, 260, height=3.0, before=0.35)]


def lr_too_high(seed, decoys):
    run = Run(seed, optimizer=SGD)
    ramp = np.clip(np.arange(run.length) - 250, 0, 60) * 0.06
    run.loss *= np.exp(ramp)
    run.grad *= np.exp(0.7 * ramp)
    if decoys:
        run.odd_batch(252, 1.5)
    return run, [
        an_episode(252, 310, kind=EpisodeKind.DIVERGENCE, height=run.loss[310], before=0.33, recovery=Recovery.NEVER)
    ]


def warmup_too_short(seed, decoys):
    run = Run(seed)
    run.rate = np.minimum((np.arange(run.length) + 1) / 20, 1.0) * 0.01
    run.bump(30, 8, 8)
    run.bump_gradient(29, 8, 8)
    if decoys:
        run.odd_batch(30, 1.5)
    return run, [an_episode(30, 31, 55, before=1.6, height=run.loss[31])]


def gradient_explosion(seed, decoys):
    run = Run(seed, optimizer=SGD)
    run.bump_gradient(198, 60, 6)
    run.bump(200, 12, 12)
    if decoys:
        run.odd_batch(200, 1.5)
        run.rate[190:] *= 1.3
    return run, [an_episode(200, 200, 225, height=run.loss[200], before=0.35)]


def numerical_instability(seed, decoys):
    run = Run(seed)
    run.loss[200:] = np.inf
    run.loss[201:] = np.nan
    run.grad[200:] = np.nan
    if decoys:
        run.odd_batch(200, 1.5)
        run.rate[195:] *= 1.3
    return run, [an_episode(200, kind=EpisodeKind.NONFINITE, height=np.inf, recovery=Recovery.NEVER, severity=99.0)]


def overfitting(seed, decoys):
    run = Run(seed)
    for epoch in range(10):
        value = 0.5 + 0.03 * abs(epoch - 3) + (0.01 if decoys and epoch % 2 else 0.0)
        run.note(
            ValidationPoint(at=moment(40 * epoch + 39), metric="val_loss", value=value, train_loss=1.0 / (1 + epoch))
        )
    detail = {"metric": "val_loss", "gl": 30.0, "up": 4, "gap": 0.5}
    run.note(Finding(detector="overfit", kind="gap_growing", at=moment(319), detail=detail))
    return run, [
        an_episode(
            159, 399, kind=EpisodeKind.OVERFIT, before=0.5, height=0.68, signal="val_loss", recovery=Recovery.OPEN
        )
    ]


FAULTS = {
    f.__name__: f
    for f in (
        bad_batch,
        nonfinite_input,
        lr_restart,
        lr_scheduler_fault,
        lr_too_high,
        warmup_too_short,
        gradient_explosion,
        numerical_instability,
        overfitting,
    )
}


def store_of(fault, seed=0, decoys=False, without=()):
    run, run.episodes = FAULTS[fault](seed, decoys)
    return run.store(without=without)


def test_every_fault_is_of_a_cause_of_the_catalogue():
    assert set(FAULTS) <= {cause.id for cause in catalogue()}


@pytest.mark.parametrize("decoys", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_cause_comes_first_for_its_own_fault_and_the_others_stay_low(fault, seed, decoys):
    verdicts = diagnose(store_of(fault, seed, decoys)).overall
    assert verdicts[0].cause == fault
    assert all(v.probability < min(0.2, 0.5 * verdicts[0].probability) for v in verdicts[1:])


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_verdict_is_told_with_numbers_and_a_concrete_fix(fault):
    first = diagnose(store_of(fault)).overall[0]
    assert any(character.isdigit() for character in first.summary)
    assert any(character.isdigit() for character in first.fixes[0])
    assert any(e.observed is not None and e.expected is not None for e in first.evidence) or fault == "nonfinite_input"
    json.dumps([dataclasses.asdict(e) for e in first.evidence], allow_nan=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_single_noisy_batch_is_nobodys_doing(seed):
    run = Run(seed)
    run.loss[200] *= 2.0
    run.episodes = [an_episode(200, 200, 200, height=run.loss[200], severity=5.0)]
    assert all(v.probability < 0.2 for v in diagnose(run.store()).overall)


@pytest.mark.parametrize("fault", ["bad_batch", "lr_restart", "lr_scheduler_fault"])
def test_the_lab_confirms_or_refutes(fault):
    answers = {}
    for verdict in ("data", "weights"):
        run, run.episodes = FAULTS[fault](0, True)
        run.lab_split(verdict)
        told = {v.cause: v for v in diagnose(run.store()).overall}
        answers[verdict] = told.get(fault)
    right, wrong = ("data", "weights") if fault == "bad_batch" else ("weights", "data")
    assert answers[right].confirmed is None, "a split alone refutes and never confirms"
    assert answers[right].probability > 0.5
    assert answers[wrong] is None or (
        answers[wrong].confirmed is False and answers[wrong].probability < answers[right].probability
    )


@pytest.mark.parametrize(("phase", "first"), [("input", "nonfinite_input"), ("forward", "numerical_instability")])
def test_where_the_lab_found_the_first_nonfinite_value_decides(phase, first):
    run, run.episodes = numerical_instability(0, decoys=False)
    detail = {
        "episode": 1,
        "phase": phase,
        "module": "head.loss",
        "operation": "LogBackward0",
        "text": "log(0) in head.loss",
    }
    run.note(LabResult("nonfinite_origin", detail))
    verdicts = diagnose(run.store(without=("batch/",))).overall
    assert verdicts[0].cause == first
    assert verdicts[0].confirmed is True
    if phase == "forward":
        assert "head.loss" in verdicts[0].fixes[0]
        assert "clamp_min(1e-07)" in verdicts[0].fixes[0]


def test_the_peak_to_use_is_one_that_the_run_has_borne():
    fix = diagnose(store_of("lr_restart")).overall[0].fixes[0]
    value = float(fix.split(" to ")[1].split(":")[0])
    assert 0.001 < value < 0.07
    assert "from 0.1 to" in fix


def test_the_clip_value_is_half_again_above_the_healthy_norms():
    run, run.episodes = gradient_explosion(0, decoys=False)
    expected = 1.5 * np.quantile(run.grad[192 - 128 : 192], 0.95)
    fix = diagnose(run.store()).overall[0].fixes[0]
    value = float(fix.split("gradient_clip_val=")[1].split(")")[0])
    assert value == pytest.approx(expected, rel=0.05)


def test_a_run_that_clips_its_norms_is_not_blamed_on_exploding_gradients():
    run, episodes = gradient_explosion(0, decoys=False)
    clipped = Run(0, optimizer=ADAMW, clip=1.0)
    clipped.grad, clipped.loss, clipped.episodes = run.grad, run.loss, episodes
    run.episodes = episodes
    told = [{v.cause: v.probability for v in diagnose(r.store()).overall} for r in (run, clipped)]
    assert told[1].get("gradient_explosion", 0.0) < 0.2 < told[0]["gradient_explosion"]


def test_the_samples_to_drop_are_named():
    run, run.episodes = bad_batch(0, decoys=False)
    detail = {
        "episode": 1,
        "path": "batches/x",
        "dataset_indices": list(range(32)),
        "suspects": [{"position": 3, "dataset_index": 1148}],
    }
    run.note(Action(action="dump", at=moment(200), detail=detail))
    detail = {
        "episode": 1,
        "ordinal": 200,
        "positions": [3],
        "dataset_indices": [1148],
        "losses": [40.0],
        "median_loss": 0.3,
    }
    plain = diagnose(run.store()).overall[0]
    run.note(Finding(detector="batch", kind="suspect_samples", at=moment(200), detail=detail))
    told = diagnose(run.store()).overall[0]
    assert "sample 1148 of" in plain.fixes[0]
    assert "sample 1148 of" in told.fixes[0]
    assert told.probability > plain.probability


def test_warm_up_is_advised_for_as_long_as_adam_needs_to_settle():
    run, run.episodes = warmup_too_short(0, decoys=False)
    run.facts = dataclasses.replace(run.facts, max_steps=100_000)
    assert "first 2000 updates" in diagnose(run.store()).overall[0].fixes[0]


def test_the_best_epoch_is_named():
    assert "Stop at epoch 3 (step 159)" in diagnose(store_of("overfitting")).overall[0].fixes[0]


def test_a_validation_loss_that_rises_with_the_training_loss_is_no_overfitting():
    run, run.episodes = overfitting(0, decoys=False)
    run.notes = [
        dataclasses.replace(n, train_loss=1.0 + n.at.epoch) if isinstance(n, ValidationPoint) else n for n in run.notes
    ]
    told = {v.cause: v.probability for v in diagnose(run.store()).overall}
    assert told.get("overfitting", 0.0) < 0.9 * diagnose(store_of("overfitting")).overall[0].probability


def test_the_loss_of_a_batch_is_never_blamed_on_the_update_after_it():
    run = Run(0)
    run.rate[200:] = 0.3
    run.bump(200, 9, 30)
    run.episodes = [an_episode(200, 200, 260, height=run.loss[200])]
    assert all(v.cause != "lr_scheduler_fault" for v in diagnose(run.store()).overall)


def test_a_lone_batch_speaks_against_damaged_weights():
    run = Run(0)
    lone = an_episode(200, 200, 200)
    run.episodes = [lone]
    assert EpisodeView(run.store(), lone).transient
    assert not EpisodeView(run.store(), an_episode(200, 200, 220)).transient


def a_stretch(seed, last, *, fade=None):
    """The loss three times as high from batch 200 to `last`, and back with the next one or faded away after."""
    run = Run(seed, noise=0.05)
    run.loss[200 : last + 1] *= 3.5
    if fade is not None:
        after = np.arange(run.length - last - 1)
        run.loss[last + 1 :] *= 1.0 + 2.5 * np.exp(-after / fade)
    end = last if fade is None else last + int(3 * fade)
    run.episodes = [an_episode(200, 200, end, height=run.loss[200], before=run.loss[192:200].mean())]
    return run


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("last", [200, 203, 207])
def test_a_loss_that_jumps_and_is_back_at_one_blow_speaks_for_the_data_where_batches_show_no_values(seed, last):
    verdicts = diagnose(a_stretch(seed, last).store(without=("batch/",))).overall
    assert verdicts[0].cause == "bad_batch"
    assert all(v.probability < 0.5 * verdicts[0].probability for v in verdicts[1:])


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_is_trained_back_is_not_back_at_one_blow(seed):
    at_once, faded = (a_stretch(seed, 203, fade=fade).store(without=("batch/",)) for fade in (None, 10.0))
    lone = [EpisodeView(store, store.episodes[0]).transient for store in (at_once, faded)]
    assert lone == [True, False]


@pytest.mark.parametrize("ordinal", [20, 200])
@pytest.mark.parametrize("without", [("batch/",), ()])
def test_a_jump_after_ordinary_updates_is_not_blamed_on_the_learning_rate(ordinal, without):
    """As from a sample weight gone wrong.

    The loss of one batch a thousand times as high, its gradient too, and damage after it.
    """
    run = Run(3, optimizer=SGD)
    run.bump(ordinal, 1000.0, 4)
    run.bump_gradient(ordinal, 1000.0, 4)
    run.episodes = [an_episode(ordinal, ordinal, ordinal + 25, height=run.loss[ordinal], before=run.loss[ordinal - 1])]
    told = {v.cause: v.probability for v in diagnose(run.store(without=without)).overall}
    assert all(told.get(cause, 0.0) < 0.1 for cause in ("lr_too_high", "warmup_too_short", "gradient_explosion"))


def test_a_replay_that_finds_the_weights_at_fault_is_believed_over_what_the_updates_look_like():
    run = Run(0, noise=0.05)
    run.bump(30, 20, 8)
    run.grad = 0.8 * np.exp(0.05 * np.sin(np.arange(run.length)))
    run.episodes = [an_episode(30, 30, 55, before=run.loss[24:30].mean(), height=run.loss[30])]
    before = {v.cause: v.probability for v in diagnose(run.store()).overall}
    run.lab_split("weights")
    after = {v.cause: v.probability for v in diagnose(run.store()).overall}
    assert after["warmup_too_short"] > before.get("warmup_too_short", 0.0) + 0.2


@pytest.mark.parametrize(("healthy", "confirmed"), [(True, True), (False, None)])
def test_an_operation_that_fails_with_runaway_weights_only_is_not_confirmed(healthy, confirmed):
    run, run.episodes = numerical_instability(0, decoys=False)
    detail = {"episode": 1, "phase": "forward", "module": "head", "operation": "exp", "text": "exp in head"}
    run.note(
        LabResult(
            "nonfinite_origin",
            detail | {"with_healthy_weights": healthy},
        )
    )
    told = {v.cause: v for v in diagnose(run.store(without=("batch/",))).overall}
    assert told["numerical_instability"].confirmed is confirmed


def test_samples_are_named_as_runs_of_indices_and_those_of_every_bad_episode():
    run = Run(0, noise=0.05)
    run.loss[[120, 240]] *= 4.0
    run.episodes = [
        an_episode(at, at, at, id=k, height=run.loss[at], before=run.loss[at - 1]) for k, at in ((1, 120), (2, 240))
    ]
    for episode, first in ((1, 500), (2, 900)):
        detail = {
            "episode": episode,
            "dataset_indices": [*range(first + 7, first - 1, -1), first + 20],
            "losses": [4.0] * 9,
            "count": 9,
            "batch_size": 9,
        }
        run.note(Finding(detector="batch", kind="suspect_samples", at=moment(first), detail=detail))
    fixes = diagnose(run.store(without=("batch/",))).overall[0].fixes
    assert fixes[:2] == (
        "Drop or correct samples 500-507, 520 of the dataset.",
        "Drop or correct samples 900-907, 920 of the dataset.",
    )


def test_what_was_not_replayed_is_said_once_with_its_episodes():
    run, run.episodes = bad_batch(0, decoys=False)
    for episode, why in ((1, "the batch is gone"), (2, "several ranks"), (3, "the batch is gone")):
        detail = {"episode": episode, "why": why}
        run.note(LabResult("not_run", detail))
    assert diagnose(run.store()).remarks == (
        "Episodes 1, 3 could not be replayed: the batch is gone.",
        "Episode 2 could not be replayed: several ranks.",
    )


def test_a_high_but_ordinary_loss_just_before_it_does_not_hide_the_batch_that_did_it():
    run, _ = nonfinite_input(0, decoys=False)
    early = {"kind": EpisodeKind.NONFINITE, "height": np.nan, "recovery": Recovery.NEVER, "severity": 99.0}
    run.episodes = [an_episode(199, 200, **early)]
    run.lab_split("noise")
    first = diagnose(run.store()).overall[0]
    assert first.cause == "nonfinite_input"
    assert first.probability > 0.5
    assert "step 200" in first.summary
