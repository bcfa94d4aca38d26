"""Overfitting that is real (80 images of digits, some labels wrong), and what the watcher does about it only where
asked."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from training_tasks import Digits, digits, seed_everything

from lightning_spike.callbacks.overfit_watcher import OverfitWatcher
from lightning_spike.errors import ConfigurationError
from lightning_spike.records import EpisodeKind
from lightning_spike.store import TrainerStateStore


class Small(Digits):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


def fit(callbacks, root, module=None, epochs=60, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    module = module or Small()
    images, labels = digits(400).tensors
    labels = labels.clone()
    labels[:80:5] = (labels[:80:5] + 1) % 10
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=callbacks,
        **({"enable_checkpointing": False} | options),
    )
    train = DataLoader(TensorDataset(images[:80], labels[:80]), 16, shuffle=True)
    trainer.fit(module, train, DataLoader(TensorDataset(images[80:], labels[80:]), 320), ckpt_path=ckpt_path)
    return trainer, module


class Reference(Callback):
    """Validation losses, mean training losses and weights, read by itself."""

    def __init__(self):
        self.validation, self.training, self.weights, self.steps, self._sum = [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._sum.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.validation.append(float(trainer.callback_metrics["val_loss"]))
        self.training.append(sum(self._sum) / len(self._sum))
        self.weights.append(copy.deepcopy(pl_module.state_dict()))
        self.steps.append(trainer.global_step)
        self._sum = []

    @property
    def best(self):
        return min(range(len(self.validation)), key=self.validation.__getitem__)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def test_it_stops_when_the_overfit_has_lasted_and_puts_the_best_weights_back(tmp_path):
    reference = Reference()
    last = ModelCheckpoint(tmp_path, filename="end", save_last=True, save_on_train_epoch_end=True)
    callbacks = [reference, OverfitWatcher(stop=True, restore_best=True, patience=2), last]
    trainer, module = fit(callbacks, tmp_path, enable_checkpointing=True)
    store = TrainerStateStore.of(trainer)
    (episode,) = store.episodes
    assert (episode.kind, episode.signal) == (EpisodeKind.OVERFIT, "val_loss")
    stop, restored = store.actions
    assert (stop.action, restored.action) == ("early_stop", "restore_best")
    assert len(reference.validation) < 60
    assert stop.detail["validations"] == 2
    assert stop.at.ordinal == 5 * len(reference.validation) - 1
    assert restored.detail["best_value"] == pytest.approx(min(reference.validation))
    assert restored.detail["best_step"] == reference.steps[reference.best]
    assert restored.detail["value"] == pytest.approx(reference.validation[-1])
    assert same(module.state_dict(), reference.weights[reference.best])
    assert not same(module.state_dict(), reference.weights[-1])
    assert next(f.kind for f in store.findings if f.detector == "overfit") == "gap_growing"


def test_without_being_asked_it_changes_nothing_and_records_the_losses(tmp_path):
    reference = Reference()
    _, plain = fit([], tmp_path, epochs=40)
    trainer, watched = fit([OverfitWatcher(), reference], tmp_path, epochs=40)
    assert same(plain.state_dict(), watched.state_dict())
    store = TrainerStateStore.of(trainer)
    assert [p.value for p in store.validations] == reference.validation
    assert [p.train_loss for p in store.validations] == pytest.approx(reference.training, rel=1e-6)
    assert store.actions == []
    assert [e.kind for e in store.episodes] == [EpisodeKind.OVERFIT]


def test_a_run_whose_validation_goes_on_falling_has_no_episode(tmp_path):
    trainer, _ = fit([OverfitWatcher(stop=True, restore_best=True)], tmp_path, epochs=6)
    store = TrainerStateStore.of(trainer)
    assert (trainer.current_epoch, store.episodes, store.actions, store.remarks) == (6, (), [], [])


def test_the_best_weights_come_back_also_when_training_ends_by_itself(tmp_path):
    class Worse(Small):
        """After the fifth epoch the weights of the last layer change sign."""

        def on_train_epoch_end(self):
            if self.current_epoch == 4:
                with torch.no_grad():
                    self.net[5].weight.mul_(-1)

    reference = Reference()
    trainer, module = fit([OverfitWatcher(restore_best=True), reference], tmp_path, Worse(), epochs=6)
    assert reference.best < 5
    assert same(module.state_dict(), reference.weights[reference.best])
    assert [a.action for a in TrainerStateStore.of(trainer).actions] == ["restore_best"]


def test_a_metric_that_was_never_logged_is_said_once_with_what_was(tmp_path):
    trainer, _ = fit([OverfitWatcher(monitor="validation/loss", stop=True, restore_best=True)], tmp_path, epochs=3)
    store = TrainerStateStore.of(trainer)
    (remark,) = store.remarks
    assert "'validation/loss'" in remark
    assert "val_loss" in remark.split("Logged:")[1]
    assert (store.validations, store.actions, store.disabled) == ([], [], [])


def test_the_sanity_check_and_a_nan_are_no_best(tmp_path):
    class Sometimes(Small):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(math.nan if self.current_epoch == 1 else 1.0 + self.current_epoch))

    trainer, _ = fit([OverfitWatcher(restore_best=True)], tmp_path, Sometimes(), epochs=3)
    store = TrainerStateStore.of(trainer)
    assert len(store.validations) == 3
    (action,) = store.actions
    assert (action.detail["best_value"], action.detail["best_step"]) == (1.0, 5)


def test_after_a_resume_the_best_value_still_counts_but_its_weights_are_gone_and_that_is_said(tmp_path):
    class Rising(Small):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(1.0 + self.current_epoch))

    first, watcher = ModelCheckpoint(tmp_path, filename="first"), OverfitWatcher(restore_best=True)
    fit([OverfitWatcher(restore_best=True), first], tmp_path, Rising(), epochs=2, enable_checkpointing=True)
    callbacks = [watcher, ModelCheckpoint(tmp_path, filename="second")]
    trainer, _ = fit(
        callbacks, tmp_path, Rising(), epochs=4, ckpt_path=first.best_model_path, enable_checkpointing=True
    )
    store = TrainerStateStore.of(trainer)
    assert [a.action for a in store.actions] == []
    assert any("from before the resume" in r and "step 5" in r for r in store.remarks)
    assert watcher.own_state()["best_value"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"monitor": ""}, "monitor"), ({"monitor": 3}, "monitor"), ({"patience": 0}, "patience"), ({"stop": 1}, "stop")],
)
def test_wrong_arguments_are_refused_at_construction(arguments, name):
    with pytest.raises(ConfigurationError, match=rf"OverfitWatcher\({name}\): expected"):
        OverfitWatcher(**arguments)
