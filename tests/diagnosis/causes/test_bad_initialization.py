"""Weights of an extreme initial scale.

With trouble at the beginning, without any, and with trouble that came much later.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding

NAMES = ("net.0.weight", "net.2.weight")


def a_run(scales=(12.0, 29.0), *, onset=None, first=30.0, found=True, length=400):
    run = Run(0, length=length)
    run.loss[:20] = np.linspace(first, 1.5, 20)
    run.layers["initial_scale"] = (NAMES, {0: list(scales)})
    run.layers["batch/target/histogram"] = (
        tuple(map(str, range(64))),
        {0: [3] * 10 + [0] * 54, 1: [4] * 10 + [0] * 54},
    )
    run.episodes = []
    if found:
        large = max(scales) > 1.0
        detail = {
            "names": list(NAMES),
            "count": 2,
            "of": 2,
            "scale": max(scales) if large else min(scales),
            "direction": "large" if large else "small",
            "text": "2 of 2 weights are off.",
        }
        run.note(Finding(detector="weights", kind="initial_scale", at=moment(0), detail=detail))
    if onset is not None:
        run.bump(onset, 20.0, 8)
        run.bump_gradient(onset - 1, 20.0, 8)
        run.episodes = [an_episode(onset, onset + 1, onset + 20, before=run.loss[onset - 1], height=run.loss[onset])]
    return run


def first_of(run):
    told = diagnose(run.store()).overall
    return told[0] if told else None


@pytest.mark.parametrize("onset", [None, 30])
def test_it_comes_first_with_or_without_an_episode_and_its_symptoms_below_it(onset):
    told = diagnose(a_run(onset=onset).store()).overall
    assert (told[0].cause, told[0].probability > 0.5) == ("bad_initialization", True)
    assert all(v.probability < 0.2 for v in told[1:])
    assert "net.2.weight most: ×29" in told[0].summary
    assert "the loss began at 30" in told[0].summary


def test_the_factor_brings_the_weights_to_torchs_own_scale():
    linear = torch.nn.Linear(4096, 64)
    usual = float(linear.weight.detach().square().mean().sqrt()) * math.sqrt(4096)
    fix = first_of(a_run()).fixes[0]
    assert float(fix.split("first values by ")[1].split(":")[0]) * 29.0 == pytest.approx(usual, rel=0.05)
    assert first_of(a_run()).change == Change(setting="initialization", value="net.2.weight")


def test_of_weights_that_are_too_small_the_smallest_is_named():
    first = first_of(a_run(scales=(0.001, 0.01), first=2.3))
    assert first.cause == "bad_initialization"
    assert first.change == Change(setting="initialization", value="net.0.weight")
    assert "far too small" in first.summary


def test_weights_of_a_usual_scale_speak_against_it():
    run = a_run(scales=(0.6, 1.4), found=False, onset=30)
    store = run.store()
    examination = said_of("bad_initialization", store, store.episodes[0])
    assert examination.total < -4.0
    assert not examination.supported


def test_trouble_that_comes_when_training_had_gone_well_for_long_is_something_else():
    store = a_run(onset=900, length=1000).store()
    assert all(v.probability < 0.1 for v in diagnose(store).overall if v.cause == "bad_initialization")


def test_a_first_loss_far_above_that_of_guessing_is_told_with_both():
    evidence = {e.signal: e for e in first_of(a_run()).evidence if "guess among" in e.text}["loss"]
    assert evidence.expected == pytest.approx(math.log(10))
    sane = {e.signal: e for e in first_of(a_run(first=2.4)).evidence if "guess among" in e.text}["loss"]
    assert sane.weight < 0.0 < evidence.weight


def test_a_resumed_run_has_no_initial_weights():
    run = a_run(found=False, onset=30)
    run.facts = dataclasses.replace(run.facts, resumed_from="last.ckpt")
    assert first_of(run) is None or first_of(run).cause != "bad_initialization"


@pytest.mark.parametrize("scales", [(math.nan, math.nan), (math.inf, 3.0), (0.0, 0.0)])
def test_any_value_is_borne(scales):
    run = a_run(scales=scales, onset=30)
    run.loss[:4] = math.nan
    store = run.store(without=("grad_norm",))
    store.findings[0] = dataclasses.replace(store.findings[0], detail={})
    assert math.isfinite(said_of("bad_initialization", store, store.episodes[0]).total)
