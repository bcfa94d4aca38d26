"""What the checks of the training step have found, near an episode, far from one, and without any."""

import dataclasses

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding

HARD = {
    ("optimizer", "not_zeroed"): "zero_grad",
    ("modes", "eval_mode"): "train_mode",
    ("optimizer", "not_optimized"): "parameters",
    ("outside_writes", "weights"): "weights",
}


def found(detector, kind, at=199, **detail):
    names = ["net.0.weight", "net.0.bias"]
    own = {"names": names, "matters": ["net.2"], "count": 2, "of": 6, "from_start": False, "text": f"It is {kind}."}
    return Finding(detector=detector, kind=kind, at=moment(at), detail=own | detail)


def spiked(*findings, onset=200):
    run = Run(0)
    run.bump(onset, 9.0, 15)
    run.episodes = [an_episode(onset, onset, onset + 30, height=run.loss[onset], before=0.35)]
    run.note(*findings)
    return run


def quiet(*findings):
    run = Run(0)
    run.episodes = []
    run.note(*findings)
    return run


def examined(run):
    store = run.store()
    return said_of("code_bug", store, store.episodes[0])


@pytest.mark.parametrize(("what", "place"), HARD.items())
def test_each_check_names_the_place_to_look_at(what, place):
    for run in (spiked(found(*what)), quiet(found(*what))):
        first = diagnose(run.store()).overall[0]
        assert (first.cause, first.change) == ("code_bug", Change(setting="code", value=place))
        assert first.probability > 0.5
        assert "step 199" in first.evidence[0].text + first.summary
        assert "NaN" not in first.summary


def test_nothing_found_speaks_against_it():
    examination = examined(spiked())
    assert not examination.supported
    assert examination.total < -1.5


@pytest.mark.parametrize("what", HARD)
def test_what_was_found_after_the_peak_has_not_brought_it_about(what):
    assert not examined(spiked(found(*what, at=240))).supported


def test_a_write_weighs_by_its_distance():
    totals = [examined(spiked(found("outside_writes", "weights", at=at))).total for at in (199, 190, 100)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 5.0 > totals[1] > 1.0 > totals[2]


def test_averages_swapped_in_at_a_validation_are_no_bug():
    swapped = found("outside_writes", "weights_at_validation")
    assert diagnose(quiet(swapped).store()).overall == ()
    assert examined(spiked(swapped)).total < 2.0


def test_weights_and_state_written_at_once_are_a_step_and_no_code_of_the_users():
    both = [found("outside_writes", kind) for kind in ("weights", "optimizer_state")]
    assert 0.0 < examined(spiked(*both)).total < 1.0


@pytest.mark.parametrize(
    "meant", [found("optimizer", kind, at=0, from_start=True) for kind in ("not_optimized", "no_gradient")]
)
def test_what_was_so_from_the_start_may_be_meant(meant):
    assert diagnose(quiet(meant).store()).overall == ()
    assert examined(spiked(meant)).total < 1.0


def test_steps_that_change_nothing_are_the_scalers_in_half_precision():
    run = spiked(found("optimizer", "no_update"))
    full = examined(run).total
    run.facts = dataclasses.replace(run.facts, precision="16-mixed")
    assert examined(run).total < 1.0 < full


def test_gradients_that_pile_up_explain_that_they_explode():
    run = spiked(found("optimizer", "not_zeroed", at=190))
    run.bump_gradient(192, 30.0, 20)
    told = {v.cause: v.probability for v in diagnose(run.store()).overall}
    assert told["code_bug"] > 0.5
    assert told.get("gradient_explosion", 0.0) < told["code_bug"]


def lab(changed, elements, *, writes=()):
    weights = {"name": "net.0.weight", "kind": "weights", "elements": 1000, "changed": elements, "powers_of_two": 0}
    detail = {
        "episode": 1,
        "changed": changed,
        "writes": list(writes),
        "different": [weights],
        "text": "It came out healthy.",
    }
    return LabResult("outside", detail)


def test_unseen_writes_are_code_where_whole_tensors_are_others():
    whole, single = (examined(spiked(lab("weights", elements))) for elements in (990, 3))
    assert whole.total > 1.0 > -2.0 > single.total


def test_a_write_that_was_seen_and_replayed_is_confirmed():
    write = found("outside_writes", "weights")
    examination = examined(spiked(write, lab(None, 0, writes=[{"ordinal": 199, "kind": "weights", "names": ["a"]}])))
    assert examination.confirmed
    assert examination.total > examined(spiked(write)).total
    of_state = examined(spiked(lab(None, 0, writes=[{"ordinal": 199, "kind": "optimizer", "names": ["a"]}])))
    assert of_state.total < 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
@pytest.mark.parametrize("what", [*HARD, ("optimizer", "no_gradient"), ("optimizer", "no_update")])
def test_bears_missing_and_broken_values(what, value):
    run = spiked(found(*what, names=value, matters=value, text=value, from_start=value), lab(None, 0))
    run.grad[150:] = np.nan
    for without in ((), ("grad_norm", "lr-", "batch/")):
        store = run.store(without=without)
        assert said_of("code_bug", store, store.episodes[0]).summary
