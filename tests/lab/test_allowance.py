"""What an examination may cost, and that it says what it left out."""

import pytest
from lab.attached import attached
from lab.episodes import LATE, At, examined, first, measured
from torch.utils.data import DataLoader
from training_tasks import Digits, digits

from lightning_spike.sandbox.budget import Allowance, step_cost
from lightning_spike.sandbox.isolation import isolated


class WithLoader(Digits):
    def train_dataloader(self):
        return DataLoader(digits(), batch_size=16)


def high_rate(trainer, module, optimizer):
    optimizer.param_groups[0]["lr"] = 1.0


def test_what_fits_is_asked_and_what_does_not_is_named():
    module = WithLoader(0.1)
    with isolated(attached(module), module) as sandbox:
        assert sandbox.affords("anything, without a limit", updates=10**6)
        sandbox.allowance = Allowance(sandbox.cost + step_cost(updates=2, passes=1) + 0.01)
        assert sandbox.affords("all that is left", updates=2, passes=1)
        assert not sandbox.affords("one pass more", updates=2, passes=2)
        assert not sandbox.affords("a gradient", updates=2, gradients=2)
        sandbox.steps, sandbox.updates = 2, 2
        assert sandbox.affords("the rest", passes=1)
        assert not sandbox.affords("a gradient", gradients=1)
        assert sandbox.allowance.left_out == ["one pass more", "a gradient"]


@pytest.mark.parametrize("allowed", [16.0, 22.0])
def test_an_examination_keeps_to_it_and_still_names_the_update(allowed, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_spike.lab.examine.FULL_STEPS", allowed)
    trainer = examined(lambda: Digits(0.003), tmp_path, At(LATE - 1, end=high_rate))
    found = measured(trainer)
    assert found.cost.left_out
    assert found.remedies == ()  # the last question of all
    assert first(trainer) == "learning_rate"
    assert found.attribution.ordinal == LATE - 1


def test_with_room_nothing_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_spike.lab.examine.FULL_STEPS", 1000.0)
    trainer = examined(lambda: Digits(0.003), tmp_path, At(LATE - 1, end=high_rate))
    found = measured(trainer)
    assert found.cost.left_out == ()
    assert found.remedies
