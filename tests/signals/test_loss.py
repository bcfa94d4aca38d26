import pytest
import torch

from lightning_spike.signals.loss import training_losses


def numbers(found):
    return {name: float(value) for name, value in found.items()}


def test_the_loss_is_multiplied_back():
    assert numbers(training_losses({"loss": torch.tensor(0.25)}, divided_by=4)) == {"loss": 1.0}


def test_other_losses_keep_their_value_and_lose_their_graph():
    other = torch.ones((), requires_grad=True) * 3
    found = training_losses(
        {"loss": torch.tensor(0.5), "kl_loss": other, "logits": torch.ones(4), "acc": torch.tensor(0.9)}, divided_by=2
    )
    assert numbers(found) == {"loss": 1.0, "loss/kl_loss": 3.0}
    assert not found["loss/kl_loss"].requires_grad


@pytest.mark.parametrize(
    "outputs", [None, {}, {"loss": None}, {"loss": torch.ones(3)}, torch.ones(2), "text", 3, {1: torch.tensor(1.0)}]
)
def test_no_loss_is_no_error(outputs):
    assert training_losses(outputs) == {}


def test_a_bare_tensor_is_the_loss():
    assert numbers(training_losses(torch.tensor([2.0]))) == {"loss": 2.0}
