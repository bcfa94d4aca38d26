"""Checksums: equal for equal bits, different for the smallest change, and exact as float32."""

import numpy as np
import pytest
import torch

from lightning_spike.signals.ranks import NO_TENSOR, checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_bit_shows(dtype):
    value = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = value.clone()
    other[7, 1] = (
        torch.nextafter(value[7, 1].float(), torch.tensor(9.0)).to(dtype)
        if dtype is torch.float32
        else value[7, 1] * 1.01
    )
    first, second, third = checksums([value, value.clone(), other]).tolist()
    assert first == second != third


def test_it_is_the_sum_of_the_bits():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    expected = int(value.numpy().view(np.int32).astype(np.int64).sum()) % 2**24
    assert checksums([value]).tolist() == [float(expected)]


def test_what_is_not_there_has_a_value_of_its_own():
    assert checksums([None, torch.zeros(3), torch.eye(2).to_sparse()]).tolist() == [NO_TENSOR, 0.0, NO_TENSOR]
    assert checksums([None]).tolist() == [NO_TENSOR]


def test_nan_is_compared_by_its_bits():
    nan = torch.full((2,), float("nan"))
    assert torch.equal(checksums([nan]), checksums([nan.clone()]))
