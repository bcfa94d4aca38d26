"""The part of a tensor that is looked at: bounded, spread evenly, and honest about the whole."""

import pytest
import torch
from torch.nn.parameter import UninitializedParameter

from lightning_spike.signals.subset import is_readable, largest_value, subset


@pytest.mark.parametrize(("count", "limit"), [(10, 64), (64, 64), (65, 64), (1000, 64), (100_000, 4096)])
def test_it_is_bounded_and_evenly_spread(count, limit):
    taken = subset(torch.arange(float(count)).reshape(-1, 1), limit)
    assert limit / 4 <= taken.numel() <= limit or taken.numel() == count
    assert taken[0] == 0
    blocks = taken[::16].diff().unique()
    assert blocks.numel() <= 1 or count <= limit
    assert taken.unique().numel() == taken.numel()
    assert taken[-1] >= count * 0.5 or count < 2 * limit


def test_a_small_tensor_is_a_view_of_itself():
    values = torch.zeros(4, 4)
    subset(values)[5] = 1.0
    assert values[1, 1] == 1.0


def test_it_estimates_the_whole():
    values = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    taken = subset(values)
    assert taken.square().mean().sqrt() == pytest.approx(float(values.square().mean().sqrt()), rel=0.02)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, dtype=torch.long),
        torch.zeros(0),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        UninitializedParameter(),
    ],
    ids=["integer", "empty", "sparse", "meta", "lazy"],
)
def test_what_has_no_plain_values_is_not_readable(tensor):
    assert not is_readable(tensor)
    assert is_readable(torch.ones(2, dtype=torch.bfloat16))


def test_the_largest_value():
    assert float(largest_value(torch.tensor([1.0, -3.0, 2.0]))) == 3.0
    assert largest_value(torch.tensor([1.0, float("nan")])).isnan()
