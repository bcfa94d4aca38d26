"""Real resumes: a sound one has no finding, each fault of a resume has its own."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from training_tasks import Digits, digits

from lightning_spike import OptimizerMonitor, TrainerStateStore
from lightning_spike.record.resume_check import not_restored, summary
from lightning_spike.testing import ResumeLosesMoments, ResumeLosesOptimizerState, ResumeRestartsSchedule

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
}
SCHEDULES = {
    "none": lambda _: None,
    "step": lambda o: {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 200), "interval": "step"},
    "epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
}


class Saves(Callback):
    """A checkpoint after an epoch, or after a batch within one; stateless, so that the resumed run may do without."""

    def __init__(self, path, step=None):
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer, pl_module):
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Net(Digits):
    def __init__(self, optimizer, schedule):
        super().__init__()
        self.makes = OPTIMIZERS[optimizer], SCHEDULES[schedule]

    def configure_optimizers(self):
        optimizer = self.makes[0](self.parameters())
        schedule = self.makes[1](optimizer)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(root, callbacks, optimizer, schedule, **options):
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Net(optimizer, schedule), DataLoader(digits(160), batch_size=16), ckpt_path=ckpt_path)
    return trainer


def resumed(root, *faults, optimizer="adam", schedule="none", every=None, watched=True):
    """The findings at the first batch after a resume from the end of the second epoch, or from within it."""
    path = root / "last.ckpt"
    first = fit(
        root, [*([OptimizerMonitor()] if watched else []), Saves(path, every)], optimizer, schedule, max_epochs=2
    )
    torch.load(path, weights_only=True)
    trainer = fit(
        root,
        [OptimizerMonitor(), *faults],
        optimizer,
        schedule,
        max_epochs=3,
        ckpt_path=path,
    )
    store = TrainerStateStore.of(trainer)
    assert store.disabled == []
    assert store.facts.first_step == (every or first.global_step)
    return [(f.kind, f.detail) for f in store.findings if f.detector == "resume"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning")
@pytest.mark.parametrize("every", [None, 13], ids=["after an epoch", "within one"])
@pytest.mark.parametrize(("optimizer", "schedule"), [("adam", "step"), ("sgd", "epoch"), ("plain", "none")])
def test_a_sound_resume_has_no_finding(optimizer, schedule, every, tmp_path):
    assert resumed(tmp_path, optimizer=optimizer, schedule=schedule, every=every) == []


@pytest.mark.parametrize(("strength", "gone"), [(1.0, 6), (0.3, 2)])
def test_an_optimizer_without_its_state(strength, gone, tmp_path):
    ((kind, detail),) = resumed(tmp_path, ResumeLosesOptimizerState(20, strength))
    assert (kind, detail["lost"], detail["optimizer"]) == ("optimizer_state", gone, "Adam")
    assert set(detail["what"]) == {"exp_avg", "exp_avg_sq", "step"}


def test_second_moments_that_are_gone(tmp_path):
    ((kind, detail),) = resumed(tmp_path, ResumeLosesMoments.strong(at=20))
    assert (kind, detail["what"], detail["restored"]) == ("optimizer_state", ["exp_avg_sq"], 0.0)


def test_a_schedule_that_begins_again(tmp_path):
    ((kind, detail),) = resumed(tmp_path, ResumeRestartsSchedule(20, 1.0), schedule="step")
    assert (kind, detail["saved"], detail["restored"]) == ("schedule", 20, 0)
    assert detail["rate_saved"] < detail["rate_restored"] == 0.01


def test_a_rate_that_is_another_without_a_schedule(tmp_path):
    ((kind, detail),) = resumed(tmp_path, ResumeRestartsSchedule.strong(at=20))
    assert (kind, detail["rate_saved"]) == ("schedule", 0.01)
    assert detail["rate_restored"] == pytest.approx(0.1)


def test_a_checkpoint_without_a_summary_says_nothing(tmp_path):
    assert resumed(tmp_path, ResumeLosesMoments.strong(at=20), watched=False) == []


def test_the_numbers_are_those_of_the_states(tmp_path):
    trainer = fit(tmp_path, [], "adam", "step", max_epochs=1)
    (optimizer,) = trainer.optimizers
    moments = torch.cat([s["exp_avg_sq"].flatten() for s in optimizer.state.values()]).double()
    told = summary(trainer)
    assert told["optimizers"][0]["states"]["exp_avg_sq"]["norm"] == pytest.approx(float(moments.norm()))
    assert told["optimizers"][0]["states"]["step"]["nonzero"] == 6
    assert told["schedulers"] == [{"class": "CosineAnnealingLR", "last_epoch": 10}]


def test_another_optimizer_is_meant(tmp_path):
    told = summary(fit(tmp_path, [], "adam", "none", max_epochs=1))
    other = copy.deepcopy(told)
    other["optimizers"][0] |= {"class": "SGD", "states": {}, "rates": [1.0]}
    assert not_restored(told, other, ["Adam"]) == []
    other = copy.deepcopy(told)
    other["optimizers"][0]["states"]["exp_avg"]["norm"] *= 1.1
    ((one),) = not_restored(told, other, ["Adam"])
    assert one.detail["what"] == ["exp_avg"]


def test_a_summary_that_cannot_be_made_costs_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_spike.callbacks.optimizer_monitor.summary", lambda _: 1 / 0)
    fit(tmp_path, [OptimizerMonitor(), Saves(tmp_path / "last.ckpt")], "adam", "none", max_epochs=1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10
