import pytest
import torch
from torch import nn

from lightning_spike.signals.gradients import NO_GRADIENT, gradient_norms


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_total_is_torchs_own_total(dtype):
    params = parameters([(3, 4), (5,), (2, 2, 2)], dtype)
    expected = torch.nn.utils.get_total_norm([p.grad.float() for p in params])
    torch.testing.assert_close(gradient_norms(params).total, expected.float())


def test_each_norm_is_its_parameters():
    params = parameters([(3, 4), (5,)])
    expected = torch.stack([p.grad.norm() for p in params])
    torch.testing.assert_close(gradient_norms(params).per_parameter, expected)


def test_a_missing_gradient_is_told_from_a_zero_and_a_nan_one():
    params = parameters([(2,), (2,), (2,), (2,)])
    params[0].grad = None
    params[1].grad.zero_()
    params[2].grad.fill_(float("nan"))
    norms = gradient_norms(params)
    assert norms.per_parameter[0] == NO_GRADIENT
    assert norms.per_parameter[1] == 0
    assert norms.per_parameter[2].isnan()
    assert norms.total.isnan()


def test_without_any_gradient_the_total_is_zero():
    norms = gradient_norms([nn.Parameter(torch.ones(2))])
    assert norms.total == 0
    assert norms.per_parameter.tolist() == [NO_GRADIENT]


def test_mixed_dtypes_keep_their_order():
    params = [
        *parameters([(4,)], torch.float32, 1),
        *parameters([(4,)], torch.bfloat16, 2),
        *parameters([(4,)], torch.float32, 3),
    ]
    expected = torch.stack([p.grad.float().norm() for p in params])
    torch.testing.assert_close(gradient_norms(params).per_parameter, expected, rtol=1e-2, atol=1e-2)


def test_sparse_gradients_count_repeated_rows_once_summed():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    dense = embedding.weight.grad.to_dense()
    torch.testing.assert_close(gradient_norms([embedding.weight]).total, dense.norm())


def test_gradients_are_left_as_they_are():
    params = parameters([(3,)])
    before = params[0].grad.clone()
    gradient_norms(params)
    assert torch.equal(params[0].grad, before)
