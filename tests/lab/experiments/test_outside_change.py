"""What was changed from outside past torch's version counters, in real trainings.

The state, the weights, or a gradient.
"""

import pytest
import torch
from lab.episodes import LATE, At, examined, measured, shares
from training_tasks import Digits


class Adam(Digits):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def sgd():
    return Digits(0.003)


def adam():
    return Adam(0.001)


def momentum(trainer, module, batch):
    for entry in trainer.optimizers[0].state.values():
        entry["momentum_buffer"].data.mul_(-3000)


def first_moments(trainer, module, batch):
    for entry in trainer.optimizers[0].state.values():
        entry["exp_avg"].data.mul_(-3000)


def second_moments(trainer, module, batch):
    for entry in trainer.optimizers[0].state.values():
        entry["exp_avg_sq"].data.mul_(1e-6)


def one_weight(trainer, module, batch):
    module.net[-1].weight.data.add_(torch.randn(10, 512, generator=torch.Generator().manual_seed(1)))


def gradient(trainer, module, optimizer):
    """Every other class away from what it is."""
    module.net[-1].weight.grad.data[::2].add_(1000)


def wrong_once(trainer, module, batch):
    """One forward pass gives other numbers, and nobody who runs it again sees that."""

    def hook(part, args, output):
        handle.remove()
        return output * torch.linspace(-20.0, 20.0, output.shape[1])

    handle = module.net[-1].register_forward_hook(hook)


def test_a_result_that_does_not_come_again_is_told_from_a_change_of_the_state(tmp_path):
    trainer = examined(sgd, tmp_path, At(LATE, start=wrong_once))
    change = measured(trainer).outside_change
    assert (change.kind, change.ordinal, change.different) == ("result", LATE, ())
    assert shares(trainer) == {"outside": 1.0}


@pytest.mark.parametrize(
    ("make", "fault", "kind", "expected"),
    [
        pytest.param(sgd, {"ordinal": LATE - 1, "start": momentum}, "optimizer", {"optimizer": 1.0}, id="sgd"),
        pytest.param(adam, {"ordinal": LATE - 1, "start": first_moments}, "optimizer", {"optimizer": 1.0}, id="m"),
        pytest.param(adam, {"ordinal": LATE - 1, "start": second_moments}, "optimizer", {"optimizer": 1.0}, id="v"),
        pytest.param(adam, {"ordinal": LATE, "start": one_weight}, "weights", {"outside": 1.0}, id="adam-weights"),
        pytest.param(sgd, {"ordinal": LATE, "start": one_weight}, "weights", {"outside": 1.0}, id="weights"),
        pytest.param(
            sgd,
            {"ordinal": LATE - 1, "end": gradient},
            "momentum_or_gradient",
            {"optimizer": 0.5, "outside": 0.5},
            id="sgd-gradient",
        ),
    ],
)
def test_the_change_is_told_by_what_differs_alone(make, fault, kind, expected, tmp_path):
    trainer = examined(make, tmp_path, At(**fault))
    change = measured(trainer).outside_change
    assert change.writes == ()
    assert change.kind == kind
    assert shares(trainer) == expected
    assert change.repaired > 0.9
    assert change.loss_with_change > 0.5
    if kind == "weights":
        assert [d.name for d in change.different] == ["net.5.weight"]
