"""All measurements in examinations of real runs."""

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from training_tasks import Digits, build, digits, train

from lightning_spike import suite
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.codec import from_plain, to_plain
from lightning_spike.diagnosis.judgement import first_changed_module, update_direction
from lightning_spike.experiments import Experiments, FailedMeasurement
from lightning_spike.store import TrainerStateStore
from lightning_spike.testing.faults.bad_batch import ExtremeValues
from lightning_spike.testing.faults.learning_rate import RateJump

AT = 100


def measured(tmp_path, fault, module=None):
    made, options = build("cnn")
    trainer = train(
        module or made,
        [fault, *suite(CounterfactualReplay(budget=1.0), dirpath=tmp_path)],
        tmp_path,
        dataset=digits(1024),
        max_epochs=-1,
        max_steps=AT + 12,
        **options,
    )
    store = TrainerStateStore.of(trainer)
    episode = next(e for e in store.episodes if e.onset.ordinal >= AT)
    found = store.experiments[episode.id]
    assert repr(from_plain(Experiments, json.loads(json.dumps(to_plain(found))))) == repr(found)
    return found


MEASUREMENTS = {"modules", "update", "precision", "modes", "loss_scale", "samples"}


def made(found):
    return {name for name in MEASUREMENTS if getattr(found, name) is not None}


def test_of_a_bad_batch_its_samples_are_measured_and_no_update(tmp_path):
    found = measured(tmp_path, ExtremeValues(AT, 30.0, share=0.2))
    assert made(found) == {"modules", "samples"}
    assert first_changed_module(found.modules).module == "net.0"
    assert len(found.samples.losses) == 16
    assert max(found.samples.gradients) > 3 * found.samples.usual_gradient


def test_of_a_step_that_was_too_long_it_is_said(tmp_path):
    found = measured(tmp_path, RateJump(AT, 100.0, length=1))
    assert {"modules", "modes", "update"} <= made(found)
    assert found.update.ordinal == AT
    assert update_direction(found.update) == "too_long"
    assert found.update.length > 20 * found.update.length_usual


class OnlyTrains(Digits):
    """Cannot be run in eval mode."""

    def training_step(self, batch, batch_idx):
        if not self.net.training:
            msg = "no loss in eval mode"
            raise RuntimeError(msg)
        x, y = batch
        return F.cross_entropy(self(x), y)


def test_what_fails_takes_no_other_measurement_with_it(tmp_path):
    torch.manual_seed(0)
    found = measured(tmp_path, RateJump(AT, 100.0, length=1), OnlyTrains())
    assert found.failed == (FailedMeasurement(measurement="modes", error="RuntimeError: no loss in eval mode"),)
    assert update_direction(found.update) == "too_long"


@pytest.mark.parametrize("kind", [Digits, OnlyTrains])
def test_the_run_is_the_same_to_the_bit(tmp_path, kind):
    def weights(callbacks):
        torch.manual_seed(0)
        module = kind()
        torch.manual_seed(0)
        options = {"dataset": digits(1024), "max_epochs": -1, "max_steps": AT + 12}
        train(module, [ExtremeValues(AT, 30.0, share=0.2), *callbacks], tmp_path, **options)
        return module.state_dict()

    plain, watched = weights([]), weights(suite(CounterfactualReplay(budget=1.0), dirpath=tmp_path))
    for name, tensor in plain.items():
        torch.testing.assert_close(watched[name], tensor, rtol=0, atol=0)
