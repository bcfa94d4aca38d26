"""RMS_t, shares near eps and the cosine of momentum, each worked out by hand in numpy from an optimizer's own state."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_spike.signals.optimizer import corrected_roots, eps_shares, memories, momentum_cosine, update_rms


def stepped(make, steps=3, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]
    optimizer = make(parameters, lr=0.01, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters, optimizer


@pytest.mark.parametrize(
    ("make", "key"),
    [(torch.optim.Adam, "exp_avg_sq"), (torch.optim.AdamW, "exp_avg_sq"), (torch.optim.RMSprop, "square_avg")],
)
def test_rms_and_roots(make, key):
    parameters, optimizer = stepped(make)
    held = list(memories(optimizer))
    assert [m.parameter for m in held] == parameters or all(
        a.parameter is b for a, b in zip(held, parameters, strict=True)
    )
    known = 1.0 if key == "square_avg" else 1 - 0.999**3
    second = [optimizer.state[p][key].double().numpy() / known for p in parameters]
    roots = corrected_roots(held)
    for root, expected in zip(roots, second, strict=True):
        np.testing.assert_allclose(root, np.sqrt(expected).ravel(), rtol=1e-5)
    expected = [
        np.sqrt(np.mean(p.grad.numpy() ** 2 / np.maximum(v, 1e-16))) for p, v in zip(parameters, second, strict=True)
    ]
    np.testing.assert_allclose(update_rms([p.grad for p in parameters], roots, [1e-8, 1e-8]), expected, rtol=1e-4)


def test_the_roots_are_of_before_the_step():
    _, optimizer = stepped(torch.optim.AdamW)
    roots = corrected_roots(list(memories(optimizer)))
    kept = [root.clone() for root in roots]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(roots, kept, strict=True))


def test_share_near_eps():
    roots = [torch.tensor([1e-9, 1e-6, 9e-8, 2e-7]), torch.tensor([0.0, 1.0])]
    np.testing.assert_allclose(eps_shares(roots, [1e-8, 1e-8]), [0.5, 0.5])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("maximize", [False, True])
def test_cosine(make, maximize):
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    parameters, optimizer = stepped(make, maximize=maximize, **options)
    key = "momentum_buffer" if make is torch.optim.SGD else "exp_avg"
    gradient = np.concatenate([p.grad.numpy().ravel() for p in parameters])
    momentum = np.concatenate([optimizer.state[p][key].numpy().ravel() for p in parameters])
    cosine = gradient @ momentum / np.linalg.norm(gradient) / np.linalg.norm(momentum)
    np.testing.assert_allclose(momentum_cosine(list(memories(optimizer))), -cosine if maximize else cosine, rtol=1e-4)


def test_large_parameters_are_estimated_and_amsgrad_divides_by_its_maximum():
    generator = torch.Generator().manual_seed(3)
    parameter = nn.Parameter(torch.randn(300, 400, generator=generator))
    optimizer = torch.optim.AdamW([parameter], amsgrad=True)
    for scale in (5.0, 1.0, 1.0):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    held = list(memories(optimizer))
    root = optimizer.state[parameter]["max_exp_avg_sq"].div(1 - 0.999**3).sqrt()
    rms = (parameter.grad / root).square().mean().sqrt()
    assert float(update_rms([parameter.grad], corrected_roots(held), [1e-8])[0]) == pytest.approx(float(rms), rel=0.05)
    gradient, momentum = parameter.grad.ravel(), optimizer.state[parameter]["exp_avg"].ravel()
    cosine = torch.nn.functional.cosine_similarity(gradient, momentum, dim=0)
    assert float(momentum_cosine(held)) == pytest.approx(float(cosine), abs=0.02)


def test_without_state_or_gradient_there_is_no_memory():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.Adam(parameters)
    parameters[0].grad = torch.ones(2)
    assert list(memories(optimizer)) == []
    optimizer.step()
    assert next(memories(optimizer)).parameter is parameters[0]
    assert len(list(memories(optimizer))) == 1
