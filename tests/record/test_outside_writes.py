"""Writes into weights and optimizer states by others than the training step, in real trainings."""

import copy

import pytest
import torch
from lab.shapes import Plain
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.testing import LossScaleJumps

AT = 37


class Meddler(Callback):
    """Does something before the batches it is asked to."""

    def __init__(self, meddle, when):
        self.meddle, self.when, self.begun = meddle, when, 0

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.when(self.begun):
            self.meddle(trainer, pl_module)
        self.begun += 1


def into_weights(trainer, module):
    module.net[0].weight.mul_(1.01)


def into_state(trainer, module):
    for entry in trainer.optimizers[0].state.values():
        entry["exp_avg_sq"].mul_(0.5)


def writes(tmp_path, *meddlers, **options):
    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    trainer = Trainer(
        **({"max_epochs": 12, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path} | options),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*meddlers, suite],
    )
    module = Plain()
    trainer.fit(module)
    assert trainer.global_step > AT
    return list(suite._witnesses.writes.writes), module


def once(batch):
    return batch == AT


def test_a_training_by_itself_writes_as_it_always_does(tmp_path):
    assert writes(tmp_path)[0] == []


def test_a_write_into_a_weight_is_seen_and_named(tmp_path):
    (seen,), _ = writes(tmp_path, Meddler(into_weights, once))
    assert (seen.kind, seen.names) == ("weights", ("net.0.weight",))
    assert seen.ordinal in (AT - 1, AT)  # before this batch, by a callback before or after ours


def test_a_write_into_the_optimizers_state_is_seen_and_named(tmp_path):
    (seen,), module = writes(tmp_path, Meddler(into_state, once))
    assert (seen.kind, set(seen.names)) == (
        "optimizer",
        {f"{name}.exp_avg_sq" for name, _ in module.named_parameters()},
    )


@pytest.mark.parametrize("every", [1, 5])
def test_who_writes_regularly_is_part_of_the_training(tmp_path, every):
    assert writes(tmp_path, Meddler(into_weights, lambda batch: batch % every == 0))[0] == []


def test_a_weight_decay_that_is_switched_on_is_the_optimizers_own_write(tmp_path):
    def decays(trainer, module):
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1 if trainer.global_step else 0.0

    assert writes(tmp_path, Meddler(decays, lambda batch: batch in {0, AT}))[0] == []


def test_accumulation_has_a_rhythm_of_its_own(tmp_path):
    found, _ = writes(
        tmp_path, Meddler(into_weights, lambda batch: batch == 75), accumulate_grad_batches=2, max_epochs=20
    )
    assert [(seen.kind, seen.ordinal in (74, 75)) for seen in found] == [("weights", True)]


def test_looking_at_weights_is_no_write(tmp_path):
    assert writes(tmp_path, Meddler(lambda _, module: copy.deepcopy(module.state_dict()), once))[0] == []


def half():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


def test_an_update_that_the_loss_scaler_skips_is_no_write_of_anybody(tmp_path):
    jump = LossScaleJumps(at=AT, strength=2.0**40)
    assert writes(tmp_path, jump, plugins=half())[0] == []


def test_beside_skipped_updates_a_write_is_seen(tmp_path):
    jump = LossScaleJumps(at=AT, strength=2.0**40)
    found, _ = writes(tmp_path, jump, Meddler(into_state, lambda batch: batch == AT + 6), plugins=half())
    assert [(seen.kind, seen.ordinal in (AT + 5, AT + 6)) for seen in found] == [("optimizer", True)]


def test_a_layer_that_is_unfrozen_is_written_to_by_the_training(tmp_path):
    freeze = Meddler(lambda _, module: module.net[0].requires_grad_(False), lambda batch: batch == 0)
    thaw = Meddler(lambda _, module: module.net[0].requires_grad_(True), once)
    assert writes(tmp_path, freeze, thaw)[0] == []
