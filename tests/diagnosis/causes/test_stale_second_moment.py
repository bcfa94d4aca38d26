"""Gradients that outgrow the second moment, with and without what shows it."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import ADAMW, SGD, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding

ID = "stale_second_moment"


def stale(at=195):
    detail = {"rms": 4.0, "usual": 1.1, "grad_norm": 9.0, "grad_norm_before": 1.0, "text": "RMS_t is high."}
    return Finding(detector="optimizer", kind="second_moment_stale", at=moment(at), detail=detail)


def blamed(group, **parts):
    finer = [{"factor": name, "group": "optimizer", "share": share} for name, share in parts.items()]
    return (
        LabResult("blame", {"episode": 1, "shares": {group: 1.0}}),
        LabResult("factors", {"episode": 1, "finer": finer}),
    )


def grown(*findings, rms=5.0, growth=1.05, optimizer=ADAMW, episode=True):
    run = Run(0, optimizer=optimizer)
    run.grad[160:] *= growth ** np.minimum(np.arange(run.length - 160), 60)
    run.bump(200, 9.0, 15)
    run.episodes = [an_episode(200, 202, 240, height=run.loss[202], before=0.35)] if episode else []
    run.note(*findings)
    row = run.row

    def more(ordinal):
        plain = row(ordinal)
        own = {"update_rms": rms if ordinal >= 170 else 1.1} if ordinal % 10 == 0 and optimizer is ADAMW else {}
        return dataclasses.replace(plain, values={**plain.values, **own})

    run.row = more
    return run


def examined(run):
    store = run.store()
    return said_of("stale_second_moment", store, store.episodes[0])


def test_gradients_that_outgrew_it_are_blamed_for_the_spike():
    first = diagnose(grown(stale(), *blamed("optimizer", second_moments=0.9)).store()).overall[0]
    assert first.cause == ID
    assert first.probability > 0.8


def test_it_is_told_where_the_loss_has_borne_it():
    assert [v.cause for v in diagnose(grown(stale(), episode=False).store()).overall] == [ID]


@pytest.mark.parametrize("run", [{"rms": 1.2}, {"growth": 1.0, "rms": 1.2}, {"optimizer": SGD}])
def test_without_one_of_the_pieces_it_is_not_this(run):
    assert examined(grown(**run)).total < 0.0


def test_an_experiment_that_finds_the_momentum_or_a_sound_state_speaks_against_it():
    right, wrong, sound = (
        examined(grown(stale(), *told)).total
        for told in (blamed("optimizer", second_moments=0.9), blamed("optimizer", momentum=0.9), blamed("data"))
    )
    assert right > wrong > sound


@pytest.mark.parametrize(("growth", "value"), [(1.003, 0.99), (1.015, 0.95), (1.2, 0.9)])
def test_the_memory_advised_follows_the_growth_that_was_measured(growth, value):
    run = grown(stale(), growth=growth)
    run.grad[160:] = 0.8 * growth ** np.arange(run.length - 160)
    assert examined(run).change == Change(setting="betas", value=value)  # the longest with beta2 <= 1 / growth²


def test_it_bears_anything():
    run = grown(dataclasses.replace(stale(), detail={}), rms=np.nan)
    run.grad[:] = np.nan
    assert np.isfinite(examined(run).total)
