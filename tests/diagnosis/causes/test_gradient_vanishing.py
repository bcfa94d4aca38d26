"""Gradients that vanish with and without an episode, below units that went flat, and not at all."""

import math

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import SGD, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery


def a_run(*, found=True, loss=True, now=2e-6, flat=False, odd=False):
    run = Run(0, noise=0.05, optimizer=SGD)
    run.layers["grad_norm"] = (("net.0.weight", "net.2.weight"), {t: [0.5, 0.5] for t in range(0, 400, 10)})
    run.episodes = []
    if found:
        names = ["net.0.weight", "net.0.bias"]
        detail = {"names": names, "count": 2, "of": 6, "before": 0.5, "now": now, "text": "Gradients have vanished."}
        run.note(Finding(detector="gradients", kind="vanished", at=moment(239), detail=detail))
    if flat:
        rows = {o: [1.0 if o >= 200 else 0.5] for o in (0, 50, 100, 150, 203, 250)}
        run.layers["activation_zeros"] = (("net.1",), rows)
    if odd:
        run.odd_batch(200, 40.0)
    if loss:
        run.loss[200:] *= 6.0
        height = float(run.loss[200:].max())
        run.episodes = [
            an_episode(200, 210, kind=EpisodeKind.DIVERGENCE, before=0.35, height=height, recovery=Recovery.NEVER)
        ]
    return run


def examined(run, **options):
    store = run.store(**options)
    return said_of("gradient_vanishing", store, store.episodes[0])


@pytest.mark.parametrize("loss", [True, False])
def test_gradients_that_vanished_come_first_with_or_without_an_episode(loss):
    first, *rest = diagnose(a_run(loss=loss).store()).overall
    assert (first.cause, first.probability > 0.5) == ("gradient_vanishing", True)
    assert all(v.probability < 0.2 for v in rest)
    assert first.change == Change(setting="normalization_layer", value="net.0")
    assert "by a factor of 2.5e+05" in first.summary
    assert "around net.0" in first.fixes[0]


def test_gradients_as_they_were_speak_against_it():
    told = examined(a_run(found=False))
    assert told.total < -4.0
    assert diagnose(a_run(found=False, loss=False).store()).overall == ()


def test_units_that_went_flat_are_its_cause():
    told = {v.cause: v.probability for v in diagnose(a_run(flat=True, now=0.0).store()).overall}
    assert told["activation_saturation"] > 0.5
    assert told.get("gradient_vanishing", 0.0) < 0.2


def test_an_odd_batch_before_lies_upstream():
    assert examined(a_run(odd=True)).total < examined(a_run()).total - 2.5


@pytest.mark.parametrize("value", [None, math.nan, "much", -1.0, 0.0])
def test_any_detail_is_borne(value):
    run = a_run(now=value)
    assert math.isfinite(examined(run).total)
    assert math.isfinite(examined(run, without=("loss", "grad_norm", "lr-", "batch/")).total)


def norms_at_the_jump(norm):
    run = a_run()
    run.layers["grad_norm"] = (
        ("net.0.weight", "net.2.weight"),
        {t: [norm if 200 <= t < 204 else 0.5, 0.5] for t in range(400)},
    )
    return examined(run).total


def test_gradients_that_were_there_when_the_loss_had_jumped_vanished_with_what_it_did():
    assert norms_at_the_jump(50.0) < norms_at_the_jump(1e-6) - 2.5


def test_a_gradient_that_had_gone_before_a_slow_rise_speaks_for_it_and_against_the_rate():
    run = a_run()
    run.loss[200:] = 0.35 * np.exp(np.minimum(np.arange(200) / 40, 2.0))
    there = {v.cause: v.probability for v in diagnose(run.store()).overall}
    run.grad[190:] *= 1e-4
    gone = {v.cause: v.probability for v in diagnose(run.store()).overall}
    assert max(gone, key=gone.get) == "gradient_vanishing"
    assert gone["gradient_vanishing"] > there.get("gradient_vanishing", 0.0)
    assert gone.get("lr_too_high", 0.0) < there.get("lr_too_high", 1.0)


@pytest.mark.parametrize(("first", "computation", "speaks"), [(1e-3, 1.0, True), (0.2, 1.0, False), (1e-3, 0.0, False)])
def test_a_gradient_that_falls_off_by_experiment_shows_it(first, computation, speaks):
    run = a_run(found=False)
    split = {
        "episode": 1,
        "verdict": "computation",
        "computation": computation,
        "noise": 0.2,
        "text": "It has changed.",
    }
    modules = [
        {"module": name, "kind": "Linear", "now": {"rms": 1.0, "gradient": now}, "usual": {"rms": 1.0, "gradient": 1.0}}
        for name, now in (("net.0", first), ("net.2", 1.0))
    ]
    detail = {"episode": 1, "what": "modules", "first": None, "modules": modules, "text": "It has changed."}
    for name, told in (("split", split), ("measured", detail)):
        run.note(LabResult(name, told))
    assert (examined(run).total > 2.0) is speaks
    assert ("net.0" in examined(run).fixes[0]) is speaks
