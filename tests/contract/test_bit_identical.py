"""Observing changes nothing: losses and final weights are the same, to the bit, with the whole suite and without it."""

import pytest
import torch
from lightning.pytorch import Callback
from training_tasks import TASKS, build, digits, spoilt_digits, train

from lightning_spike import suite


class Losses(Callback):
    """The losses as Lightning hands them out, and those of manual backward passes; independent of the suite."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(loss.detach().clone())


def outcome(task, callbacks, root, dataset, burst, **options):
    module, own = build(task)
    module.burst = burst
    losses = Losses()
    train(module, [losses, *callbacks], root, dataset=dataset, **(own | options))
    generators = torch.get_rng_state()
    return losses.seen, module.state_dict(), generators


@pytest.mark.parametrize("fault", [False, True], ids=["healthy", "fault"])
@pytest.mark.parametrize("task", TASKS)
def test_losses_weights_and_random_state_are_the_same(task, fault, tmp_path):
    """With a fault, episodes, dumps and replays really happen: a burst of the loss, or by hand an image blown up."""
    data = spoilt_digits if fault and task == "two_by_hand" else digits
    options = {"validate": task != "two_by_hand", "max_epochs": 3, "burst": 30 if fault else None}
    plain = outcome(task, [], tmp_path / "plain", data(), **options)
    callbacks = suite(dirpath=tmp_path / "spike")
    watched = outcome(task, callbacks, tmp_path / "watched", data(), **options)
    assert all(torch.equal(a, b) or (a.isnan() and b.isnan()) for a, b in zip(plain[0], watched[0], strict=True))
    assert plain[1].keys() == watched[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(watched[1][name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(plain[2], watched[2])
    store = callbacks[0].flight.store
    assert store.disabled == []
    if fault:
        assert store.episodes, "nothing happened, so nothing was tested"
