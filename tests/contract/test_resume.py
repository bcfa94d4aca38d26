"""The suite's state goes through Lightning's own checkpoint, read back with weights_only=True, and the run goes on
where it was."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training_tasks import build, digits

from lightning_spike import TrainerStateStore, suite


def fit(root, callbacks, *, max_epochs, ckpt_path=None):
    module, _ = build("cnn")
    checkpoint = ModelCheckpoint(root / "checkpoints", filename="last", save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", logger=False, callbacks=[*callbacks, checkpoint],
        default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(digits(), batch_size=16), DataLoader(digits(64), batch_size=16), ckpt_path=ckpt_path)
    return trainer


def test_the_checkpoint_loads_safely_and_the_numbering_goes_on(tmp_path):
    fit(tmp_path, suite(dirpath=tmp_path / "spike", rollback=True), max_epochs=3)
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.load(path, weights_only=True)
    trainer = fit(tmp_path, suite(dirpath=tmp_path / "spike", rollback=True), max_epochs=5, ckpt_path=path)
    store = TrainerStateStore.of(trainer)
    assert store.disabled == []
    assert store.facts.resumed_from == str(path)
    assert store.facts.first_step == 96
    assert store.history.ordinals.tolist() == list(range(96, 160))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["same order", "reversed"])
def test_whoever_leads_after_the_resume_has_the_shared_state(order, tmp_path):
    fit(tmp_path, suite(dirpath=tmp_path / "spike"), max_epochs=3)
    path = tmp_path / "checkpoints" / "last.ckpt"
    trainer = fit(tmp_path, suite(dirpath=tmp_path / "spike")[order], max_epochs=4, ckpt_path=path)
    assert TrainerStateStore.of(trainer).history.ordinals[0] == 96


def test_a_checkpoint_from_a_run_without_the_suite_is_no_trouble(tmp_path):
    fit(tmp_path, [], max_epochs=2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    trainer = fit(tmp_path, suite(dirpath=tmp_path / "spike"), max_epochs=3, ckpt_path=path)
    store = TrainerStateStore.of(trainer)
    assert store.facts.first_step == 64
    assert store.disabled == []
