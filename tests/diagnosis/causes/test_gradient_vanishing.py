"""Gradients that vanish with and without an episode, below units that went flat, and not at all."""

import math

import pytest
from synthetic import SGD, Run, an_episode, moment

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.causes.gradient_vanishing import GradientVanishing
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
    return GradientVanishing().examine(Case(store, store.episodes[0]))


@pytest.mark.parametrize("loss", [True, False])
def test_gradients_that_vanished_come_first_with_or_without_an_episode(loss):
    first, *rest = diagnose(a_run(loss=loss).store()).overall
    assert (first.cause, first.probability > 0.5) == ("gradient_vanishing", True)
    assert all(v.probability < 0.2 for v in rest)
    assert first.change == Change(setting="normalization_layer", value="net.0")
    assert "fell 2.5e+05 times" in first.summary
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
