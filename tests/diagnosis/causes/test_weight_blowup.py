"""Weights that a decay of the wrong sign scales up, against steps that are too long, growth that came after, and
nothing at all."""

import dataclasses
import math

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import ADAMW, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery

EACH = 1.03
BEGIN = 190


def a_run(*, each=EACH, begin=BEGIN, along=1.0, weights=True, updates=True):
    """The norm of the weights is multiplied by `each` from `begin` on; `along` of the updates' length goes into it.

    The loss rises from 200 on.
    """
    run = Run(0, noise=0.05)
    ordinals = np.arange(run.length)
    looks = ordinals % 10 == 0
    norms = (6.0 + 0.002 * ordinals) * each ** np.maximum(ordinals - begin, 0)
    growing = ordinals > begin
    lengths = np.where(growing, norms * abs(1.0 - 1.0 / each) / along, 0.02) if each != 1.0 else np.full(400, 0.02)
    run.loss[200:] *= np.exp(0.02 * (ordinals[200:] - 200))
    if weights:
        run.more["weight_norm"] = np.where(looks, norms, np.nan)
        rows = {int(o): [norms[o] / 10, norms[o] / 5] for o in ordinals[looks]}
        run.layers["weight_max"] = (("net.0.weight", "net.2.weight"), rows)
    if updates:
        run.more["update_norm"] = np.where(looks, lengths, np.nan)
    run.episodes = [
        an_episode(200, 399, kind=EpisodeKind.DIVERGENCE, height=run.loss[399], before=0.35, recovery=Recovery.NEVER)
    ]
    return run


def examined(run, **options):
    store = run.store(**options)
    return said_of("weight_blowup", store, store.episodes[0])


def changed(name="weight_decay", at=BEGIN, before=0.01, after=-3.0):
    detail = {"optimizer": "AdamW", "group": 1, "name": name, "before": before, "after": after, "text": "It changed."}
    return Finding(detector="optimizer", kind="settings_changed", at=moment(at), detail=detail)


@pytest.mark.parametrize("each", [EACH, 1.2, 1 / EACH])
def test_weights_that_every_update_scales_come_first_and_steps_that_are_too_long_are_their_symptom(each):
    first, *rest = diagnose(a_run(each=each).store()).overall
    assert (first.cause, first.probability > 0.5) == ("weight_blowup", True)
    assert all(v.probability < 0.2 for v in rest)
    assert f"multiplied by {each:.3g} with every update" in first.summary
    assert "net." in first.summary


def test_long_steps_alone_would_be_the_verdict_without_the_weights():
    store = a_run(weights=False, updates=False).store()
    assert said_of("lr_too_high", store, store.episodes[0]).total > 0.0
    assert all(v.cause != "weight_blowup" for v in diagnose(store).overall)


def test_weights_that_stay_as_they_were_speak_against_it():
    assert examined(a_run(each=1.0)).total < -3.0


def test_updates_across_the_weights_are_steps_that_are_too_long():
    along, across = (examined(a_run(along=share)).total for share in (1.0, 0.1))
    assert across < along - 5.0
    assert across < 1.0


def test_growth_that_began_after_the_loss_is_its_consequence():
    assert examined(a_run(begin=240)).total < examined(a_run()).total - 3.0


def test_one_jump_is_no_growth():
    run = a_run(each=1.0)
    run.more["weight_norm"][200:] *= 50.0
    assert examined(run).total < 0.0


def test_a_decay_that_changed_is_put_back():
    run = a_run()
    before = examined(run).total
    run.note(changed(), changed(name="eps", before=1e-8, after=1e-3))
    told = examined(run)
    assert told.total > before + 3.0
    assert told.change == Change(setting="weight_decay", value=0.01)
    assert told.fixes[0].startswith("Set the weight decay of AdamW back from -3 to 0.01")


def test_a_decay_far_too_large_from_the_start_gets_a_usual_value():
    optimizer = dataclasses.replace(ADAMW, groups=({**ADAMW.groups[0], "weight_decay": 3.0},))
    run = a_run(each=1 / EACH)
    run.facts = dataclasses.replace(run.facts, optimizers=(optimizer,))
    told = examined(run)
    assert "from 3 to 0.01" in told.fixes[0]
    assert told.change == Change(setting="weight_decay", value=0.01)


def test_a_loss_that_jumps_while_the_weights_are_as_before_is_not_of_their_making():
    run = a_run(each=1 / 1.003, begin=200)
    before = examined(run).total
    run.loss[200:] *= 50.0
    run.episodes = [dataclasses.replace(run.episodes[0], loss_peak=float(run.loss[200:].max()))]
    assert examined(run).total < before - 2.5


def test_the_same_jump_with_the_weights_of_before_refutes_it():
    run = a_run()
    before = examined(run).total
    detail = {"episode": 1, "shares": {"computation": 0.95}}
    run.note(LabResult("blame", detail))
    assert examined(run).total < before - 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_any_value_is_borne(value):
    run = a_run()
    run.more["weight_norm"][200:] = value
    run.more["update_norm"][100:] = value
    assert math.isfinite(examined(run).total)
    assert math.isfinite(examined(run, without=("weight_norm", "loss")).total)


def test_uneven_growth_is_no_word_against_a_decay_that_was_changed():
    run = a_run()
    steps = np.arange(run.length)
    looks = np.isfinite(run.more["weight_norm"])
    uneven = 6.0 * np.exp(0.2 * np.maximum((steps - BEGIN) // 10, 0) * np.where(steps // 10 % 3 == 0, 0.3, 1.7))
    run.more["weight_norm"] = np.where(looks, np.maximum.accumulate(uneven), np.nan)
    alone = examined(run).total
    run.note(changed())
    assert examined(run).total > max(alone, 0.0) + 4.0
