"""The loop, driven by a real Trainer: what it counts, in which order it runs the phases, and what it hands on."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset
from training_tasks import Digits, TwoByHand, build, digits, train

from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.flight.loop import batch_size
from lightning_spike.records import RunStatus
from lightning_spike.store import TrainerStateStore


class Diary(SpikeCallback):
    """Writes down every phase that it is called in."""

    def __init__(self):
        self.entries = []
        self.status = None

    def attach(self, trainer, module):
        self.entries.append("attach")

    def begin(self, trainer, module):
        self.entries.append("begin")

    def sense_batch(self, batch):
        self.entries.append("sense_batch")

    def sense_backward(self, batch, loss):
        self.entries.append("sense_backward")

    def sense_gradients(self, batch, optimizer):
        self.entries.append("sense_gradients")

    def sense_outcome(self, batch, outputs):
        self.entries.append("sense_outcome")

    def judge(self, arrival):
        self.entries.append("judge")

    def act(self, batch, changed):
        self.entries.append("act")

    def sense_validation(self, trainer, module, at):
        self.entries.append(("sense_validation", at.step))

    def conclude(self, trainer, status, error):
        self.entries.append("conclude")
        self.status = status

    def release(self):
        self.entries.append("release")


class SecondDiary(Diary):
    pass


STEP = ["sense_batch", "sense_backward", "sense_gradients", "sense_outcome", "judge", "act"]


def test_the_phases_come_in_order(tmp_path):
    diary = Diary()
    train(Digits(), [diary], tmp_path, max_steps=2, validate=True, limit_val_batches=1, val_check_interval=2)
    start = ["attach", "begin", *STEP, *STEP, ("sense_validation", 2)]
    assert diary.entries[: len(start)] == start
    assert [e for e in diary.entries[len(start) :] if e != "release"] == ["conclude"]
    assert diary.entries[-1] == "release"
    assert diary.status == RunStatus.FINISHED


def test_each_phase_runs_for_all_before_the_next_begins(tmp_path):
    first, second = Diary(), SecondDiary()
    first.entries = second.entries = []
    train(Digits(), [first, second], tmp_path, max_steps=1)
    inside = [e for e in first.entries if e in STEP]
    assert inside == [phase for phase in STEP for _ in range(2)]


def test_accumulation_shares_a_step_and_restores_the_loss(tmp_path):
    losses = []

    class Told(Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    trainer = train(Told(), [Diary()], tmp_path, max_epochs=1, accumulate_grad_batches=3)
    history = TrainerStateStore.of(trainer).history
    assert [m.step for m in history.moments()][:7] == [0, 0, 0, 1, 1, 1, 2]
    torch.testing.assert_close(
        torch.tensor(history.series("loss")), torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_moments_number_batches_over_epochs(tmp_path):
    trainer = train(Digits(), [Diary()], tmp_path, max_epochs=2)
    moments = list(TrainerStateStore.of(trainer).history.moments())
    assert [m.ordinal for m in moments] == list(range(64))
    assert (moments[32].epoch, moments[32].batch_idx, moments[32].step) == (1, 0, 32)


def test_by_hand_the_losses_are_those_of_the_backward_passes(tmp_path):
    trainer = train(TwoByHand(), [Diary()], tmp_path, max_epochs=1)
    history = TrainerStateStore.of(trainer).history
    assert {"loss/backward0", "loss/backward1"} <= set(history.signals)
    assert "loss" not in history.signals
    assert [m.step for m in history.moments()][:3] == [0, 2, 4]


def test_a_step_without_a_loss_is_no_trouble(tmp_path):
    class Sometimes(Digits):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        trainer = train(Sometimes(), [Diary()], tmp_path, max_epochs=1)
    store = TrainerStateStore.of(trainer)
    assert store.history.at("loss", 3) is None
    assert store.history.at("loss", 4) is not None
    assert store.disabled == []


def test_a_loader_that_yields_none_is_no_trouble(tmp_path):
    class Gaps(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return i

    def collate(items):
        if items == [2]:
            return None
        x, y = zip(*[digits().tensors[0:2] for _ in items], strict=True)
        return [x[0][:8], y[0][:8]]

    module, _ = build("cnn")
    diary = Diary()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[diary],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="train_dataloader.*yielded None"):
        trainer.fit(module, DataLoader(Gaps(), collate_fn=collate))
    store = TrainerStateStore.of(trainer)
    assert len(store.history) == 5
    assert store.disabled == []


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError, RunStatus.EXCEPTION), (KeyboardInterrupt, RunStatus.INTERRUPTED)]
)
def test_however_the_run_ends_it_concludes_once(raised, status, tmp_path):
    class Fails(Digits):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise raised
            return super().training_step(batch, batch_idx)

    diary = Diary()
    with pytest.raises(SystemExit if raised is KeyboardInterrupt else raised):
        train(Fails(), [diary], tmp_path)
    assert diary.entries.count("conclude") == 1
    assert diary.status == status


def test_stopping_early_is_told_from_finishing(tmp_path):
    class Stops(Digits):
        def training_step(self, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 5 or self.trainer.should_stop
            return super().training_step(batch, batch_idx)

    diary = Diary()
    train(Stops(), [diary], tmp_path, max_epochs=3)
    assert diary.status == RunStatus.STOPPED_EARLY


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(5, 2), 5),
        ([torch.ones(5, 2), torch.ones(5)], 5),
        ({"a": torch.ones(3, 2), "b": [torch.ones(3), torch.ones(7)]}, 3),
        (torch.tensor(1.0), None),
        (None, None),
        ("text", None),
        ([None, "text", torch.ones(4)], 4),
    ],
)
def test_batch_size(batch, expected):
    assert batch_size(batch) == expected


def test_nan_is_recorded_as_it_is(tmp_path):
    class Poisoned(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 4 else 1)

    trainer = train(Poisoned(), [Diary()], tmp_path, max_epochs=1)
    assert math.isnan(TrainerStateStore.of(trainer).history.at("loss", 4))
