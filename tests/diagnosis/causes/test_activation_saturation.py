"""Units that go flat with the loss, after it, and not at all; and what lies upstream of it."""

import math

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import SGD, Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change, EpisodeKind, Finding, Recovery

NAMES = ("net.1", "net.3")


def a_run(*, flat_from=200, share=0.97, signal="activation_zeros", usual=0.5, found=False, loss=True, rate=False):
    run = Run(0, noise=0.05, optimizer=SGD)
    rows = {o: [usual, share if o >= flat_from else usual] for o in (0, 50, 100, 150, 203, 250, 300, 350)}
    run.layers[signal] = (NAMES, rows)
    run.episodes = []
    if found:
        detail = {"names": ["net.3"], "count": 1, "of": 2, "share": share, "before": usual, "text": "net.3 is flat."}
        run.note(Finding(detector="activations", kind="flat", at=moment(250), detail=detail))
    if rate:
        run.rate[199:] *= 50.0
    if loss:
        run.loss[200:] *= 6.0
        height = float(run.loss[200:].max())
        run.episodes = [
            an_episode(200, 210, kind=EpisodeKind.DIVERGENCE, before=0.35, height=height, recovery=Recovery.NEVER)
        ]
    return run


def examined(run, **options):
    store = run.store(**options)
    return said_of("activation_saturation", store, store.episodes[0])


@pytest.mark.parametrize(
    ("signal", "usual", "word"), [("activation_zeros", 0.5, "dead"), ("activation_saturated", 0.01, "saturated")]
)
def test_units_that_go_flat_with_the_loss_come_first(signal, usual, word):
    first, *rest = diagnose(a_run(signal=signal, usual=usual).store()).overall
    assert (first.cause, first.probability > 0.5) == ("activation_saturation", True)
    assert all(v.probability < 0.2 for v in rest)
    assert first.change == Change(setting="activation", value="net.3")
    assert f"97 % of the outputs of net.3 are {word}" in first.summary


def test_without_an_episode_the_finding_shows_it():
    (first,) = diagnose(a_run(loss=False, found=True).store()).overall
    assert (first.cause, first.probability > 0.5) == ("activation_saturation", True)
    assert "the loss does not show it" in first.summary
    assert diagnose(a_run(loss=False).store()).overall == ()


def test_layers_as_alive_as_ever_speak_against_it():
    told = examined(a_run(share=0.52))
    assert told.total < -4.0
    assert not told.supported


def test_units_that_were_alive_when_the_loss_had_risen_went_flat_of_something_else():
    assert examined(a_run(flat_from=300)).total < examined(a_run()).total - 2.5


def with_sizes(run, then, later):
    """Root mean squares of the flat layer and of the one behind it: 1 and 2 before, so many times as large at the first
    look after the onset, and later."""
    times = {203: then, 250: later, 300: later, 350: later}
    rows = {o: [1.0, 1.0 * times.get(o, (1.0, 1.0))[0], 2.0 * times.get(o, (1.0, 1.0))[1]] for o in range(0, 400, 50)}
    rows[203] = [1.0, then[0], 2.0 * then[1]]
    run.layers["activation_rms"] = ((*NAMES, "net.4"), rows)
    return run


def test_zeros_in_outputs_that_are_larger_as_a_whole_are_dropout():
    told = diagnose(with_sizes(a_run(found=True), (2.2, 2.0), (0.5, 0.5)).store()).overall
    assert {v.cause: v.probability for v in told}.get("activation_saturation", 0.0) < 0.1


@pytest.mark.parametrize(
    "then", [(0.2, 0.2), (2.5, 0.3), (math.nan, 2.0)], ids=["both smaller", "its input", "unknown"]
)
def test_units_that_die_take_their_share_with_them(then):
    assert examined(with_sizes(a_run(), then, (2.0, 2.0))).total == examined(a_run()).total


def test_a_jump_before_any_unit_died_speaks_for_nothing_here():
    jump = examined(a_run())
    assert any(e.signal == "loss" and e.weight > 0.0 for e in jump.evidence)
    assert not any(e.signal == "loss" and e.weight > 0.0 for e in examined(a_run(flat_from=300)).evidence)


def test_a_jump_of_the_learning_rate_before_it_lies_upstream():
    assert examined(a_run(rate=True)).total < examined(a_run()).total - 3.0
    assert diagnose(a_run(rate=True).store()).overall[0].cause == "lr_scheduler_fault"


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_any_value_is_borne(value):
    run = a_run(found=True)
    run.layers["activation_zeros"][1][203] = [value, value]
    assert math.isfinite(examined(run).total)
    run.layers["activation_zeros"] = (NAMES, {200: [value] * 3})
    assert math.isfinite(examined(run, without=("batch/", "grad_norm", "lr-")).total)


def test_nothing_is_said_where_activations_were_not_measured():
    run = a_run()
    run.layers = {}
    assert not examined(run).supported
    assert np.isfinite(examined(run).total)


def silenced(kind, times):
    """The lab has found the outputs of `net.1` changed by a factor, with the weights and batches of before.

    The looks of the training show nothing.
    """
    run = a_run(share=0.52)
    split = {"episode": 1, "verdict": "computation", "computation": 1.0, "noise": 0.2, "text": "It has changed."}
    activity = {"module": "net.1", "kind": kind, "now": {"rms": times}, "usual": {"rms": 1.0}}
    modules = {"episode": 1, "what": "modules", "first": "net.1", "modules": [activity], "text": "It has changed."}
    for name, detail in (("split", split), ("measured", modules)):
        run.note(LabResult(name, detail))
    return examined(run).total


def test_an_activation_that_fell_silent_by_experiment_is_proof():
    assert silenced("GELU", 0.15) > 4.0
    assert silenced("GELU", 0.6) < 0.0
    assert silenced("Linear", 0.15) < 0.0


def test_a_layer_that_is_louder_than_ever_when_the_loss_has_jumped_died_later():
    run = a_run(flat_from=250)
    quiet, loud = (
        {o: [1.0, 3.0 if o == 203 and louder else 1.0] for o in (0, 50, 100, 150, 203)} for louder in (False, True)
    )
    totals = []
    for rows in (quiet, loud):
        run.layers["activation_zeros"] = (NAMES, {**run.layers["activation_zeros"][1], 203: [0.5, 0.8]})
        run.layers["activation_rms"] = (NAMES, rows)
        totals.append(examined(run).total)
    assert totals[1] < totals[0] - 2.0


def test_a_setting_of_the_optimizer_that_was_changed_lies_upstream():
    run = a_run()
    before = examined(run).total
    detail = {"name": "momentum", "before": 0.9, "after": 0.999, "text": "momentum went from 0.9 to 0.999."}
    run.note(Finding(detector="optimizer", kind="settings_changed", at=moment(180), detail=detail))
    assert examined(run).total == pytest.approx(before - 3.0)


@pytest.mark.parametrize(("kind", "speaks"), [("LSTM", True), ("Linear", False)])
def test_a_tenth_of_a_recurrent_layers_outputs_at_their_bounds_shows_that_its_gates_are_flat(kind, speaks):
    run = a_run(signal="activation_saturated", usual=0.0, share=0.12)
    activity = {"module": "net.3", "kind": kind, "now": {"rms": 1.0}, "usual": {"rms": 1.0}}
    detail = {"episode": 1, "what": "modules", "first": None, "modules": [activity], "text": "Nothing has changed."}
    run.note(LabResult("measured", detail))
    assert (examined(run).total > 2.0) is speaks
