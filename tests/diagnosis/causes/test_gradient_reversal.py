"""`gradient_reversal`: gradients that point up the loss that they were made from."""

import numpy as np
from lab_results import experiments, update, with_shares
from synthetic import Run, an_episode, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change


def spiked(*, falls=True, **fields):
    run = Run(0)
    if not falls:
        run.loss[:] = run.loss[-1] * np.exp(0.1 * np.random.default_rng(1).standard_normal(run.length))
    run.bump(200, 9.0, 15)
    run.episodes = [an_episode(200, 200, 230, height=run.loss[200], before=0.35)]
    run.note(experiments(**fields))
    return run.store()


def test_a_gradient_that_points_up_its_own_loss_is_proof_and_names_the_step():
    first = diagnose(spiked(**with_shares(gradient=1.0))).overall[0]
    assert (first.cause, first.confirmed, first.change) == (
        "gradient_reversal",
        True,
        Change(setting="code", value="gradient"),
    )
    assert first.probability > 0.7
    assert "step 199" in first.fixes[0]


def test_without_a_measured_slope_below_0_it_is_not_said():
    ordinary = with_shares(intrinsic=1.0) | {"update": update(rho=0.2, slope=0.9)}
    for fields in ({}, with_shares(intrinsic=1.0), ordinary):
        said = said_of("gradient_reversal", spiked(**fields))
        assert not said.supported
        assert said.level("turned_gradient") == "no slope below 0"


def test_where_all_replayed_gradients_point_uphill_the_loss_must_have_fallen_before():
    fields = with_shares(intrinsic=1.0) | {"update": update(rho=-1.0, slope=-1.0, slope_usual=-1.0)}
    assert said_of("gradient_reversal", spiked(**fields)).level("slope") == "turned throughout"
    assert not said_of("gradient_reversal", spiked(falls=False, **fields)).supported
