"""What does not come again when the moment is run again, and what the lab found to be another."""

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, Finding, LayerRow


def of_lab(kind, **detail):
    return LabResult(kind, {"episode": 1, "text": f"The lab says {kind}."} | detail)


def outside(changed, hit=0, flips=0, *, writes=(), of=1000, **detail):
    weights = {"name": "net.0.weight", "kind": "weights", "elements": of, "changed": hit, "powers_of_two": flips}
    own = {"changed": changed, "writes": list(writes), "different": [weights] if hit else [], "repaired": 1.0}
    return of_lab("outside", **(own | detail))


def spiked(*findings):
    run = Run(0)
    run.bump(200, 9.0, 15)
    run.episodes = [an_episode(200, 200, 230, height=run.loss[200], before=0.35)]
    run.note(*findings)
    return run


def examined(run):
    store = run.store()
    return said_of("hardware_fault", store, store.episodes[0])


NOT_AGAIN = of_lab("split", verdict="not_reproduced"), of_lab("blame", shares={"outside": 1.0})


@pytest.mark.parametrize(
    "what",
    [outside("weights", 5, 5), outside("result"), outside("weights", 200, 200)],
    ids=["bits", "result", "many bits"],
)
def test_single_bits_and_results_that_do_not_come_again_are_the_machines(what):
    first = diagnose(spiked(*NOT_AGAIN, what).store()).overall[0]
    assert (first.cause, first.change, first.confirmed) == (
        "hardware_fault",
        Change(setting="hardware", value="device"),
        True,
    )
    assert first.probability > 0.5
    assert "step 200" in first.fixes[0]


def test_bits_are_told_from_other_numbers_and_from_whole_tensors():
    totals = [examined(spiked(outside("weights", *hit))).total for hit in ((5, 5), (5, 0), (900, 4))]
    assert totals[0] > totals[1] > totals[2]
    assert totals[2] < 2.0


@pytest.mark.parametrize("changed", ["optimizer", "gradient", "momentum_or_gradient"])
def test_what_is_in_state_or_gradient_is_not_called_a_flipped_bit(changed):
    assert examined(spiked(outside(changed))).total < 2.0


def test_somebody_who_was_seen_writing_clears_the_machine():
    write = Finding(
        detector="outside_writes", kind="weights", at=moment(199), detail={"names": ["a"], "text": "Written."}
    )
    run = spiked(
        *NOT_AGAIN, write, outside("weights", 5, 5, writes=[{"ordinal": 199, "kind": "weights", "names": ["a"]}])
    )
    assert examined(run).total < examined(spiked(outside("weights", 5, 5))).total - 4.0
    assert diagnose(run.store()).overall[0].cause == "code_bug"


@pytest.mark.parametrize("told", [(), (of_lab("split", verdict="data"), of_lab("blame", shares={"data": 1.0}))])
def test_without_a_re_run_that_differs_nothing_speaks_for_it(told):
    examination = examined(spiked(*told))
    assert not examination.supported
    assert examination.total < -2.0


@pytest.mark.parametrize(("size", "speaks"), [(3e37, True), (50.0, False), (np.nan, False), (np.inf, False)])
def test_a_weight_that_no_training_makes(size, speaks):
    run = spiked()
    store = run.store()
    store.layer_names["weight_max"] = ("a", "b")
    rows = [([1.0, 2.0], 190), ([1.0, size], 200)]
    store.layers["weight_max"] = [
        LayerRow(at=moment(at), signal="weight_max", values=np.array(v, dtype=np.float32)) for v, at in rows
    ]
    assert said_of("hardware_fault", store, store.episodes[0]).supported is speaks


@pytest.mark.parametrize("value", [None, np.nan, np.inf])
def test_bears_missing_and_broken_values(value):
    for finding in (outside(None, repaired=value), outside("weights", 1, 1, of=0, repaired=value)):
        run = spiked(finding)
        run.grad[100:] = np.nan
        assert np.isfinite(examined(run).total)
