"""Whatever part of ours breaks, in whatever phase.

One warning, named in the store, and the training is what it would have been.
"""

import json
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from training_tasks import build, digits, train

from lightning_spike import GradNormMonitor, RootCauseReport, TrainerStateStore, suite
from lightning_spike.errors import ConfigurationError
from lightning_spike.flight.loop import Flight
from lightning_spike.record.participant import Participant

PHASES = [
    "begin",
    "sense_batch",
    "sense_backward",
    "sense_gradients",
    "sense_outcome",
    "judge",
    "act",
    "sense_validation",
    "conclude",
    "release",
]


def weights_after(callbacks, root, **options):
    module, own = build("cnn")
    trainer = train(module, callbacks, root, validate=True, **(own | options))
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    return weights_after([], tmp_path_factory.mktemp("plain"))[1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_part_that_breaks_is_switched_off(phase, untouched, tmp_path):
    assert hasattr(Participant, phase)

    class Broken(GradNormMonitor):
        pass

    def broken(self, *args):
        raise ZeroDivisionError

    setattr(Broken, phase, broken)
    callbacks = [Broken(), *suite(dirpath=tmp_path / "spike", replay=False)[1:]]
    with pytest.warns(UserWarning, match="Broken broke and is switched off") as caught:
        trainer, weights = weights_after(callbacks, tmp_path)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert all(torch.equal(weights[name], value) for name, value in untouched.items())
    store = TrainerStateStore.of(trainer)
    assert [d.part for d in store.disabled] == ["Broken"]
    assert store.disabled[0].reason.startswith("ZeroDivisionError")
    assert len(store.history) == 64


def test_not_even_where_warnings_are_errors_is_the_training_stopped(untouched, tmp_path, swallowed_warnings):
    class Broken(GradNormMonitor):
        def sense_batch(self, batch):
            raise ZeroDivisionError

    _, weights = weights_after([Broken()], tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in untouched.items())
    assert len(swallowed_warnings) == 1
    swallowed_warnings.clear()


def test_if_the_loop_itself_breaks_the_training_goes_on(untouched, tmp_path, monkeypatch):
    def broken(self, outputs):
        raise ZeroDivisionError

    monkeypatch.setattr(Flight, "batch_end", broken)
    with pytest.warns(UserWarning, match="the suite broke and is switched off") as caught:
        _, weights = weights_after(suite(dirpath=tmp_path / "spike"), tmp_path)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert all(torch.equal(weights[name], value) for name, value in untouched.items())


def test_if_the_loop_breaks_on_the_way_the_report_still_comes_and_says_so(tmp_path, monkeypatch):
    original = Flight.batch_end

    def broken(self, outputs):
        if len(self.store.history) == 20:
            raise ZeroDivisionError
        original(self, outputs)

    monkeypatch.setattr(Flight, "batch_end", broken)
    with pytest.warns(UserWarning, match="the suite broke and is switched off"):
        weights_after(suite(dirpath=tmp_path / "spike"), tmp_path)
    report = json.loads((tmp_path / "spike" / "report.json").read_text())
    assert [d["part"] for d in report["disabled"]] == ["Flight"]


class OwnReport(RootCauseReport):
    pass


def test_two_of_a_kind_are_refused_before_training(tmp_path):
    """Two of the very same class are refused by Lightning already, since both would keep their state under one key."""
    with pytest.raises(ConfigurationError, match="two of RootCauseReport"):
        weights_after([OwnReport(dirpath=tmp_path), RootCauseReport(dirpath=tmp_path)], tmp_path)


def test_a_second_fit_starts_clean(tmp_path):
    callbacks = suite(dirpath=tmp_path / "spike")
    first, _ = weights_after(callbacks, tmp_path)
    before = TrainerStateStore.of(first)
    second, _ = weights_after(callbacks, tmp_path)
    after = TrainerStateStore.of(second)
    assert after is not before
    assert len(after.history) == len(before.history) == 64
    assert after.history.ordinals[0] == 0


def test_the_same_trainer_can_fit_again(tmp_path):
    module, _ = build("cnn")
    callbacks = suite(dirpath=tmp_path / "spike")
    trainer = train(module, callbacks, tmp_path, max_epochs=1)
    first = TrainerStateStore.of(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(digits(64), batch_size=16))
    assert TrainerStateStore.of(trainer) is not first


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"overfit_batches": 2}, {"limit_train_batches": 0}], ids=str)
def test_lightnings_short_runs_work(options, tmp_path):
    trainer, _ = weights_after(suite(dirpath=tmp_path / "spike"), tmp_path, **options)
    assert trainer.state.finished
    assert TrainerStateStore.of(trainer).disabled == []


def test_barebones_works(tmp_path):
    module, _ = build("cnn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(barebones=True, max_steps=5, accelerator="cpu", callbacks=suite(dirpath=tmp_path / "spike"))
        trainer.fit(module, DataLoader(digits(), batch_size=16))
    assert len(TrainerStateStore.of(trainer).history) == 5


def test_validate_and_test_do_not_wake_the_suite(tmp_path):
    module, _ = build("cnn")
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=suite(dirpath=tmp_path / "spike"), enable_progress_bar=False
    )
    trainer.validate(module, DataLoader(digits(64), batch_size=16), verbose=False)
    with pytest.raises(LookupError):
        TrainerStateStore.of(trainer)
