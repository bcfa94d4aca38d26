"""Finite values that blow up in some batches and not in others, with the weights of before."""

import math

import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, said_of

from lightning_spike.diagnosis.rank import diagnose


def a_run(*, noise=30.0, verdict="noise", height=40.0, before=0.35):
    run = Run(0)
    run.loss[200] = height
    run.grad[200] *= 1000.0
    run.bump(203, 2.0, 15)
    run.episodes = [an_episode(200, 201, 220, height=height, before=before)]
    detail = {"episode": 1, "verdict": verdict, "noise": noise, "text": "That is within the scatter."}
    run.note(LabResult("split", detail))
    return run


def examined(run):
    store = run.store()
    return said_of("numerical_instability", store, store.episodes[0])


def test_ordinary_batches_that_scatter_by_orders_of_magnitude_show_a_division_by_nearly_nothing():
    first, *rest = diagnose(a_run().store()).overall
    assert (first.cause, first.probability > 0.5) == ("numerical_instability", True)
    assert all(v.probability < 0.2 for v in rest)


@pytest.mark.parametrize(
    "options",
    [{"noise": 1.5}, {"noise": math.nan}, {"before": 20.0}],
    ids=["ordinary scatter", "no number", "losses of that size"],
)
def test_an_ordinary_scatter_shows_nothing(options):
    assert examined(a_run(**options)).total < 0.0


def test_a_loss_of_another_order_with_the_weights_of_before_is_the_work_of_an_operation():
    same, other = (examined(a_run(height=1e5, verdict=v, noise=0.2)).total for v in ("computation", "both"))
    assert same > other + 3.0


def outputs_grown(times, *, computation, verdict="weights"):
    run = a_run(noise=0.2, verdict=verdict, height=400.0)
    activity = [{"module": "head", "now": {"rms": times}, "usual": {"rms": 1.0}}]
    split = {"episode": 1, "verdict": verdict, "computation": computation, "noise": 0.2, "text": ""}
    modules = {"episode": 1, "what": "modules", "first": "head", "modules": activity, "text": ""}
    run.note(*(LabResult(k, d) for k, d in (("split", split), ("measured", modules))))
    return examined(run).total


def test_outputs_that_grew_count_wherever_what_is_computed_has_a_part_in_the_jump():
    assert outputs_grown(20.0, computation=0.4) > 4.0
    assert outputs_grown(20.0, computation=0.1) < 0.0
    assert outputs_grown(4.0, computation=0.4) < 0.0


@pytest.mark.parametrize("cause", ["bad_batch", "label_noise"])
def test_what_scatters_all_batches_is_not_in_one_of_them(cause):
    totals = []
    for noise in (0.2, 30.0):
        run = a_run(noise=noise, verdict="data")
        store = run.store()
        totals.append(said_of(cause, store, store.episodes[0]).total)
    assert totals[1] <= totals[0] - 3.0
