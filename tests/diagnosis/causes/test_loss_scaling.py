"""A loss scale that leapt, updates that were skipped, gradients that were lost, and runs that have no scale."""

import dataclasses

import numpy as np
import pytest
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery

ID = "loss_scaling"
LEAPT = {"before": 1024.0, "after": 2.0**-20, "text": "The loss scale went from 1024 to 1e-06."}


def found(kind, at=198, **detail):
    return Finding(detector="precision", kind=kind, at=moment(at), detail={"text": f"It is {kind}."} | detail)


def half(*findings, episode=True, zeros=None, scaled=True, kind=EpisodeKind.SPIKE):
    run = Run(0, precision="16-mixed" if scaled else "32-true")
    if kind is EpisodeKind.NONFINITE:
        run.loss[200:] = np.nan
        run.episodes = [an_episode(200, kind=kind, height=np.nan, recovery=Recovery.NEVER)]
    else:
        run.bump(200, 9.0, 15)
        run.episodes = [an_episode(200, 200, 230, height=run.loss[200], before=0.35)]
    run.episodes = run.episodes if episode else []
    run.note(*findings)
    row = run.row

    def more(ordinal):
        own = {"loss_scale": 1024.0 if ordinal < 198 else 1e-6, "skipped_step": 0.0} if scaled else {}
        if zeros is not None and ordinal % 10 == 0:
            own |= {"grad_zeros": zeros if ordinal >= 190 else 0.02, "grad_underflow": 0.0}
        plain = row(ordinal)
        return dataclasses.replace(plain, values={**plain.values, **own})

    run.row = more
    return run


def examined(run):
    store = run.store()
    return said_of("loss_scaling", store, store.episodes[0])


@pytest.mark.parametrize("episode", [True, False])
def test_a_scale_that_leapt_is_told_with_the_scale_from_before(episode):
    first = diagnose(half(found("scale_leapt", **LEAPT), episode=episode).store()).overall[0]
    assert (first.cause, first.change) == (ID, Change(setting="loss_scale", value=1024.0))
    assert first.probability > 0.5
    assert "init_scale=1024" in first.fixes[0]


def test_skipped_updates_are_a_symptom_where_the_loss_is_not_finite():
    spike, nan = (examined(half(found("often_skipped"), kind=k)) for k in (EpisodeKind.SPIKE, EpisodeKind.NONFINITE))
    assert spike.total > 0.0 >= nan.total


def test_lost_gradients_speak_for_it_unless_they_were_always_so():
    assert examined(half(zeros=0.9)).total > examined(half(zeros=0.05)).total
    assert examined(half(zeros=0.05)).total < 0.0


def test_a_run_in_float32_cannot_have_it():
    assert examined(half(scaled=False)).total < -4.0


def test_a_scaler_that_does_as_it_should_is_not_blamed():
    assert ID not in {v.cause for v in diagnose(half().store()).overall}


def test_it_bears_anything():
    run = half(found("scale_leapt", before="a", after=None), zeros=np.nan)
    run.grad[:] = np.nan
    assert np.isfinite(examined(run).total)
