"""Over a resume: faults go on counting, and the faults of the resume itself take out of the checkpoint what they
say."""

import pytest
import torch
from lightning.pytorch import Callback
from testing.runs import AT, BATCHES, different, same, train

from lightning_spike.testing import (
    RateJump,
    ResumeLosesMoments,
    ResumeLosesOptimizerState,
    ResumeRestartsSchedule,
    WeightsOverwritten,
)


class Saves(Callback):
    """A checkpoint after the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def resumed(tmp_path, *faults, optimizer="sgd"):
    path = tmp_path / "run.ckpt"
    if not path.exists():
        train(Saves(path), optimizer=optimizer)
    return train(*faults, optimizer=optimizer, max_epochs=2, ckpt_path=path)


def test_a_fault_counts_the_batches_before_the_resume(tmp_path):
    plain = resumed(tmp_path)
    run = resumed(tmp_path, RateJump(BATCHES + AT, 10.0, length=1), WeightsOverwritten(BATCHES + AT + 2, 1.0))
    differing = [different(a, b) for a, b in zip(run.rows, plain.rows, strict=True)]
    assert differing[: AT + 1] == [set()] * AT + [{"settings"}]
    assert "weights" in differing[AT + 2]


def test_one_that_struck_before_the_resume_does_not_strike_again(tmp_path):
    plain, run = resumed(tmp_path), resumed(tmp_path, WeightsOverwritten(AT, 1.0), RateJump(AT, 10.0, length=2))
    assert not any(different(a, b) for a, b in zip(run.rows, plain.rows, strict=True))


def test_one_that_lasts_goes_on(tmp_path):
    plain, run = resumed(tmp_path), resumed(tmp_path, RateJump(AT, 10.0))
    assert different(run.rows[0], plain.rows[0]) == {"settings"}


@pytest.mark.parametrize(("strength", "lost"), [(1.0, 6), (0.5, 3)])
def test_the_optimizers_state_is_lost(tmp_path, strength, lost):
    plain = resumed(tmp_path, optimizer="adamw").rows[0].state[0]
    run = resumed(tmp_path, ResumeLosesOptimizerState(BATCHES, strength), optimizer="adamw").rows[0]
    assert len(plain) == 6
    assert len(run.state[0]) == 6 - lost


def test_second_moments_are_lost_and_the_file_stays(tmp_path):
    plain = resumed(tmp_path, optimizer="adamw").rows[0].state[0]
    run = resumed(tmp_path, ResumeLosesMoments.strong(at=BATCHES), optimizer="adamw").rows[0].state[0]
    for now, then in zip(run, plain, strict=True):
        assert not now["exp_avg_sq"].any()
        assert same(now["exp_avg"], then["exp_avg"])
        assert same(now["step"], then["step"])
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["optimizer_states"][0]["state"][0]["exp_avg_sq"].any()


def test_the_schedule_begins_again(tmp_path):
    run = resumed(tmp_path, ResumeRestartsSchedule(BATCHES, 1.0))
    fresh = train()
    assert run.rows[0].settings[0]["lr"] == fresh.rows[0].settings[0]["lr"] == 0.05
    assert resumed(tmp_path).rows[0].settings[0]["lr"] < 0.04
