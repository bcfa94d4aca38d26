"""Writes into the optimizer's state, near an episode, far from one, and where the loss has borne them."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery

ID = "optimizer_state_corruption"
NAMES = ["net.0.weight.exp_avg", "net.0.bias.exp_avg"]


def write(at, kind="optimizer_state"):
    detail = {"names": NAMES, "count": 2, "text": "2 states of the optimizer were written to."}
    return Finding(detector="outside_writes", kind=kind, at=moment(at), detail=detail)


def outside(changed, writes=()):
    detail = {"episode": 1, "changed": changed, "writes": list(writes), "repaired": 0.98, "text": "Changed it was."}
    return LabResult("outside", detail)


def blame(group):
    return LabResult("blame", {"episode": 1, "shares": {group: 1.0}})


def spiked(*findings, onset=200, optimizer=None):
    run = Run(0) if optimizer is None else Run(0, optimizer=optimizer)
    run.bump(onset, 9.0, 15)
    run.bump_gradient(onset, 9.0, 15)
    run.episodes = [an_episode(onset, onset, onset + 30, height=run.loss[onset], before=0.35)]
    run.note(*findings)
    return run


def quiet(*findings):
    run = Run(0)
    run.episodes = []
    run.note(*findings)
    return run


def with_signals(run, **signals):
    """Further series, recorded at every eighth batch."""
    row = run.row

    def more(ordinal):
        plain = row(ordinal)
        own = {name.replace("__", "/"): value for name, value in signals.items()} if ordinal % 8 == 0 else {}
        return dataclasses.replace(plain, values={**plain.values, **own})

    run.row = more
    return run


def examined(run):
    store = run.store()
    return said_of("optimizer_state_corruption", store, store.episodes[0])


@pytest.mark.parametrize("kind", ["optimizer_state", "optimizer_state_at_validation"])
@pytest.mark.parametrize("lag", [1, 2])
def test_a_write_just_before_the_loss_rises_did_it(kind, lag):
    first, *others = diagnose(spiked(write(200 - lag, kind)).store()).overall
    assert first.cause == ID
    assert first.probability > 0.8
    assert all(v.probability < 0.1 for v in others)


def test_the_experiment_confirms_it():
    first = diagnose(
        spiked(write(198), outside("optimizer", [{"kind": "optimizer"}]), blame("optimizer")).store()
    ).overall[0]
    assert (first.cause, first.confirmed) == (ID, True)
    assert first.probability > 0.98


def test_an_experiment_that_finds_the_weights_changed_speaks_against_it():
    told = {v.cause: v for v in diagnose(spiked(outside("weights"), blame("outside")).store()).overall}
    assert ID not in told


def test_a_write_that_the_loss_has_borne_is_told_all_the_same():
    (only,) = diagnose(quiet(write(150)).store()).overall
    assert (only.cause, only.episodes) == (ID, ())
    assert only.probability > 0.5
    assert "step 150" in only.summary
    assert "NaN" not in only.summary


def test_who_resets_the_state_every_so_often_means_it():
    often = [write(at) for at in range(50, 400, 50)]
    assert (
        diagnose(quiet(*often).store()).overall[0].probability
        < diagnose(quiet(often[0]).store()).overall[0].probability
    )
    assert examined(spiked(*[f for f in often if f.at.ordinal < 200], onset=190)).total <= 0.0


def test_without_a_write_it_is_out_of_the_question():
    plain, watched = spiked(), with_signals(spiked(), momentum_cosine=0.3)
    assert examined(watched).total < examined(plain).total < -2.0
    assert not examined(watched).supported


@pytest.mark.parametrize("lag", [40, 120])
def test_a_write_long_before_is_no_explanation(lag):
    verdicts = {v.cause: v.probability for v in diagnose(spiked(write(200 - lag)).store()).overall}
    assert verdicts.get(ID, 0.0) < 0.5 * max(verdicts.values(), default=1.0) or verdicts.get(ID, 0.0) < 0.2


def test_an_experiment_with_later_updates_refutes_no_write_before_them():
    early, late = (spiked(write(191), blame("intrinsic")) for _ in range(2))
    for run, first in ((early, 192), (late, 197)):
        run.note(LabResult("factors", {"episode": 1, "ordinal": first}))
    assert examined(late).total == pytest.approx(examined(early).total + 3.0)


def test_a_long_update_after_the_write_shows_what_it_did():
    usual, long = (with_signals(spiked(write(191)), update_norm=1.0) for _ in range(2))
    row = long.row
    long.row = lambda o: (
        row(o) if o != 192 else dataclasses.replace(row(o), values={**row(o).values, "update_norm": 40.0})
    )
    assert examined(long).total == pytest.approx(examined(usual).total + 1.6)


def test_a_write_after_the_peak_is_none():
    assert not examined(spiked(write(205))).supported


def test_who_writes_into_weights_and_state_alike_is_less_likely_this():
    alone, both = spiked(write(199)), spiked(write(199), write(199, "weights"))
    assert examined(both).total < examined(alone).total


def test_the_state_to_go_back_to_is_that_of_the_last_snapshot_before_the_write():
    run = with_signals(spiked(write(198)), snapshot__finite=1.0)
    first = diagnose(run.store()).overall[0]
    assert first.change == Change(setting="optimizer_state", value=192.0)  # 24 * 8
    assert "step 192" in first.fixes[0]
    assert "`net.0.weight.exp_avg`" in first.fixes[1]
    assert diagnose(spiked(write(198)).store()).overall[0].change == Change(setting="optimizer_state", value=None)


def test_it_bears_anything():
    run = spiked(Finding(detector="outside_writes", kind="optimizer_state", at=moment(199), detail={"names": None}))
    run.loss[200:], run.grad[:] = np.nan, np.nan
    run.episodes = [an_episode(200, kind=EpisodeKind.NONFINITE, height=np.nan, recovery=Recovery.NEVER)]
    run = with_signals(run, snapshot__finite=np.nan)
    assert diagnose(run.store()).overall[0].cause == ID
    assert np.isfinite(examined(run).total)
