"""Observing changes nothing: losses and final weights are the same, to the bit, with the whole suite and without it."""

import pytest
import torch
from lightning.pytorch import Callback
from training_tasks import TASKS, build, digits, train

from lightning_spike import TrainerStateStore, suite


class Losses(Callback):
    """The losses as Lightning hands them out, and those of manual backward passes; independent of the suite."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(loss.detach().clone())


def outcome(task, callbacks, root, dataset, **options):
    module, own = build(task)
    losses = Losses()
    train(module, [losses, *callbacks], root, dataset=dataset, **(own | options))
    generators = torch.get_rng_state()
    return losses.seen, module.state_dict(), generators


def spoilt_digits():
    """The digits with sixteen images blown up, so that episodes, dumps and replays really happen."""
    dataset = digits()
    dataset.tensors[0][200:216] *= 500
    return dataset


@pytest.mark.parametrize("data", [digits, spoilt_digits], ids=["healthy", "spoilt"])
@pytest.mark.parametrize("task", TASKS)
def test_losses_weights_and_random_state_are_the_same(task, data, tmp_path):
    validate = task != "two_by_hand"
    plain = outcome(task, [], tmp_path / "plain", data(), validate=validate, max_epochs=5)
    watched_callbacks = suite(dirpath=tmp_path / "spike")
    watched = outcome(task, watched_callbacks, tmp_path / "watched", data(), validate=validate, max_epochs=5)
    assert all(torch.equal(a, b) or (a.isnan() and b.isnan()) for a, b in zip(plain[0], watched[0], strict=True))
    assert plain[1].keys() == watched[1].keys()
    for name, value in plain[1].items():
        assert torch.equal(value, watched[1][name]) or value.isnan().any(), name
    assert torch.equal(plain[2], watched[2])
    store = watched_callbacks[0].flight.store
    assert store.disabled == []
    assert isinstance(store, TrainerStateStore)
    if data is spoilt_digits:
        assert store.episodes, "nothing happened, so nothing was tested"
