"""`label_noise`: batches whose samples do badly under any weights though their inputs are ordinary."""

import numpy as np
import pytest
from lab_results import LabResult
from synthetic import Run, an_episode, moment, said_of

from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Finding


def wrong_labels(seed=0, share=1.0, lab=True, first=None, height=None):
    run = Run(seed, noise=0.05)
    rng = np.random.default_rng(seed)
    run.more["batch/target/entropy"] = 2.2 + 0.05 * rng.standard_normal(run.length)
    run.loss[200:202] = 6.0 if height is None else height
    run.episodes = [an_episode(200, 200, 201, height=run.loss[200], before=0.35)]
    if lab:
        samples = [8.0] * round(16 * share) + [0.1] * (16 - round(16 * share))
        shares = {
            "data": 1.0,
            "learning_rate": 0.0,
            "optimizer": 0.0,
            "numerics": 0.0,
            "intrinsic": 0.0,
            "outside": 0.0,
        }
        for kind, detail in (
            ("split", {"verdict": "data", "data": 0.97, "text": "The batch itself makes the jump."}),
            ("blame", {"shares": shares, "text": "By experiment the jump is due to the batch."}),
            ("measured", {"modules": [], "first": first, "text": ""}),
            ("measured", {"losses": samples, "usual_losses": [0.1, 0.2, 0.5, 0.3], "text": ""}),
        ):
            run.note(LabResult(kind, {"episode": 1, **detail}))
    return run


def said(run, without=()):
    store = run.store(without=without)
    return said_of("label_noise", store, store.episodes[0])


def test_it_comes_first_and_the_batch_is_its_symptom():
    ranked = {v.cause: v.probability for v in diagnose(wrong_labels().store()).overall}
    assert next(iter(ranked)) == "label_noise"
    assert ranked["label_noise"] > 0.8
    assert ranked.get("bad_batch", 0.0) < 0.1


@pytest.mark.parametrize("piece", ["share", "first", "height"])
def test_each_piece_that_is_missing_weakens_it(piece):
    less = {"share": 1 / 16, "first": "net.0", "height": 1.0}[piece]
    assert said(wrong_labels(**{piece: less})).total < said(wrong_labels()).total - 1.0


def test_outputs_that_blew_up_are_no_matter_of_labels():
    run = wrong_labels()
    before = said(run).total
    sizes = {"module": "head", "now": {"rms": 2400.0}, "usual": {"rms": 2.4}}
    detail = {"episode": 1, "what": "modules", "modules": [sizes], "first": "head", "text": ""}
    run.note(LabResult("measured", detail))
    assert said(run).total < before - 4.0


def test_odd_inputs_speak_against_it():
    run = wrong_labels()
    run.odd_batch(200, 40)
    assert said(run).total < 0.0
    assert diagnose(run.store()).overall[0].cause == "bad_batch"


def test_tokens_of_another_make_up_are_a_batch_and_no_labels():
    run = wrong_labels()
    run.more["batch/input.x/entropy"] = 2.9 + 0.1 * np.random.default_rng(1).standard_normal(run.length)
    ordinary = said(run, without=("batch/input/",)).total
    run.more["batch/input.x/entropy"][200] = 4.1
    assert said(run, without=("batch/input/",)).total < 0.0 < ordinary


def test_without_anything_that_shows_the_samples_it_does_not_speak():
    run = wrong_labels(lab=False)
    assert not said(run).supported
    assert said(run).total <= -3.0
    detail = {"episode": 1, "count": 14, "batch_size": 16, "losses": [6.0], "median_loss": 6.0}
    run.note(Finding(detector="batch", kind="suspect_samples", at=moment(200), detail=detail))
    assert said(run).total > 0.0


def test_weights_at_fault_and_losses_that_are_not_finite_are_no_labels():
    run = wrong_labels(lab=False)
    run.lab_split("weights")
    assert not said(run).supported
    assert said(wrong_labels(height=np.nan)).total < said(wrong_labels()).total - 3.0


def test_a_target_that_came_sorted_is_a_matter_of_order():
    run = wrong_labels()
    run.more["batch/target/entropy"][190:205] = 0.1
    assert said(run).total < said(wrong_labels()).total - 3.0


def test_the_samples_named_are_to_be_left_out():
    run = wrong_labels()
    detail = {"episode": 1, "dataset_indices": [5, 6, 7], "losses": [8.0] * 3, "count": 3, "batch_size": 16}
    run.note(Finding(detector="batch", kind="suspect_samples", at=moment(200), detail=detail))
    told = said(run)
    assert (told.change.setting, told.change.value) == ("drop_samples", (5, 6, 7))
    assert "samples 5-7" in told.fixes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signals_that_are_missing_or_not_finite_are_borne(bad):
    run = wrong_labels()
    run.std[::2] = run.mean[::2] = run.max_abs[:] = bad
    run.more["batch/target/entropy"][:] = bad
    assert np.isfinite(said(run).total)
    assert np.isfinite(said(wrong_labels(), without=("batch/", "grad_norm", "lr-")).total)


@pytest.mark.parametrize("cause", ["label_noise", "bad_batch"])
@pytest.mark.parametrize(("far", "speaks"), [(3.4, False), (6.0, True)])
def test_a_lone_batch_no_higher_than_the_highest_of_so_many_is_chance(cause, far, speaks):
    """With 300 batches before it, of which the highest lies sqrt(2 ln 300) = 3.4 standard deviations above the
    others."""
    run = Run(0)
    run.loss[300] *= 3.0
    run.episodes = [an_episode(300, 300, 300, height=run.loss[300], before=0.35)]
    detail = {
        "episode": 1,
        "verdict": "data",
        "jump": 1.0,
        "noise": 0.2,
        "data": 0.2 * (far - 2.0),
        "text": "So it is.",
    }
    run.note(LabResult("split", detail))
    store = run.store()
    assert said_of(cause, store, store.episodes[0]).supported is speaks
