import io

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_spike.callbacks.lr_peak_detector import LRPeakDetector
from lightning_spike.errors import ConfigurationError
from lightning_spike.store import TrainerStateStore

BATCHES = 10


class Model(LightningModule):
    """Two parameter groups, a schedule of the test's choice; notes the rates with which the optimizer really steps."""

    def __init__(self, schedule=None, *, two_groups=False, jump_at=None):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        self.schedule, self.two_groups, self.jump_at = schedule, two_groups, jump_at
        self.used = []

    def training_step(self, batch, batch_idx):
        return self.layers(batch[0]).square().mean()

    def on_train_batch_start(self, batch, batch_idx):
        if self.jump_at is not None and self.global_step == self.jump_at:
            self.optimizers().optimizer.param_groups[0]["lr"] = 0.05

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.used.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self):
        groups = [{"params": self.layers[0].parameters()}, {"params": self.layers[1].parameters(), "lr": 0.002}]
        optimizer = torch.optim.SGD(groups if self.two_groups else self.parameters(), lr=0.001)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def fit(model, *callbacks, epochs=3, ckpt_path=None, **options):
    torch.set_num_threads(1)
    data = DataLoader(
        TensorDataset(torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(0))), batch_size=4
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, TrainerStateStore.of(trainer)


def restarts(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=8)


def kinds(store):
    return [(f.kind, f.at.step) for f in store.findings if f.detector == "learning_rate"]


def test_the_rates_are_those_that_the_updates_used():
    model = Model(restarts, two_groups=True)
    _, store = fit(model, LRPeakDetector())
    recorded = [store.history.series(f"lr-SGD/pg{k}").tolist() for k in (1, 2)]
    assert [list(pair) for pair in zip(*recorded, strict=True)] == model.used


def test_under_accumulation_only_batches_with_an_update_have_a_rate():
    model = Model()
    _, store = fit(model, LRPeakDetector(), accumulate_grad_batches=2)
    assert store.history.present("lr-SGD").tolist() == [False, True] * (3 * BATCHES // 2)


def test_restarts_are_found_where_the_schedule_has_them():
    _, store = fit(Model(restarts), LRPeakDetector())
    assert kinds(store) == [("restart", 8), ("restart", 16), ("restart", 24)]
    detail = next(f.detail for f in store.findings)
    assert (detail["scheduler"], detail["planned"]) == ("CosineAnnealingWarmRestarts", True)


def test_a_jump_by_the_users_own_code_is_unexplained():
    _, store = fit(Model(jump_at=12), LRPeakDetector())
    assert kinds(store) == [("unexplained_jump", 12)]


def test_moves_below_the_asked_ratio_are_not_reported():
    assert kinds(fit(Model(jump_at=12), LRPeakDetector(jump=49.0))[1]) == [("unexplained_jump", 12)]
    assert kinds(fit(Model(jump_at=12), LRPeakDetector(jump=51.0))[1]) == []


def test_a_steady_rate_is_nothing_to_report():
    assert kinds(fit(Model(), LRPeakDetector())[1]) == []


def test_over_a_resume_a_schedule_goes_on_as_if_there_had_been_none(tmp_path):
    trainer, first = fit(Model(restarts), LRPeakDetector(), epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any("LRPeakDetector" in key for key in plain["callbacks"])
    _, second = fit(Model(restarts), LRPeakDetector(), ckpt_path=tmp_path / "last.ckpt")
    assert kinds(first) + kinds(second) == kinds(fit(Model(restarts), LRPeakDetector())[1])


def test_a_rate_that_a_resume_lost_is_an_unexplained_jump(tmp_path):
    trainer, _ = fit(Model(), LRPeakDetector(), epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, second = fit(Model(jump_at=BATCHES), LRPeakDetector(), ckpt_path=tmp_path / "last.ckpt")
    assert kinds(second) == [("unexplained_jump", BATCHES)]
    assert second.findings[0].detail["resumed"] is True


def test_the_state_is_bounded_and_plain():
    callback = LRPeakDetector()
    fit(Model(restarts), callback)
    buffer = io.BytesIO()
    torch.save(callback.own_state(), buffer)
    assert buffer.tell() < 10_000
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == callback.own_state()


def test_it_changes_nothing():
    weights = []
    for callbacks in ([], [LRPeakDetector()]):
        torch.manual_seed(1)
        model = Model(restarts)
        torch.set_num_threads(1)
        if callbacks:
            fit(model, *callbacks)
        else:
            data = DataLoader(
                TensorDataset(torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(0))), batch_size=4
            )
            quiet = {
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
            Trainer(max_epochs=3, accelerator="cpu", **quiet).fit(model, data)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("jump", [1.0, 1.49, 0.0, -2.0, float("nan"), float("inf"), "2", True, None])
def test_a_jump_that_makes_no_sense_is_refused_at_construction(jump):
    with pytest.raises(ConfigurationError, match=r"LRPeakDetector\(jump\): expected .* was given"):
        LRPeakDetector(jump=jump)
