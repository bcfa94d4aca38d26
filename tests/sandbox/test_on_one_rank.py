"""A step of one rank of several, which must not wait for the others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_spike.errors import CannotReplay
from lightning_spike.sandbox.trainer_context import on_one_rank


class Strategy:
    def all_gather(self, tensor):
        return torch.stack([tensor, tensor])


def trainer(world):
    return SimpleNamespace(world_size=world, strategy=Strategy())


def test_synchronised_normalisation_goes_by_the_ranks_own_batch():
    torch.manual_seed(0)
    plain, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    synced = nn.Sequential(nn.SyncBatchNorm(3))
    with on_one_rank(trainer(2), synced):
        # torch's own forward would refuse to synchronise on the CPU, or wait for the others
        assert synced[0].forward.func is nn.modules.batchnorm._BatchNorm.forward
        assert torch.equal(synced(x), plain(x))
    assert torch.equal(synced[0].running_mean, plain.running_mean)
    assert "forward" not in vars(synced[0])


def test_what_lightning_would_exchange_is_refused_and_comes_back():
    mine, tensor = trainer(2), torch.ones(2)
    with on_one_rank(mine, nn.Identity()), pytest.raises(CannotReplay, match="all_gather"):
        mine.strategy.all_gather(tensor)
    assert mine.strategy.all_gather(tensor).shape == (2, 2)


def test_a_single_process_is_left_alone():
    mine = trainer(1)
    with on_one_rank(mine, nn.SyncBatchNorm(3)):
        assert mine.strategy.all_gather(torch.ones(2)).shape == (2, 2)
