import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lightning_spike.samples.per_sample import GradientNormBounds

SIZE = 10


def exact(net, x, y):
    """The norms of the samples' own gradients, without those of the biases."""
    parameters = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    fixed = {name: p for name, p in net.named_parameters() if p.dim() == 1}

    def loss(parameters, x, y):
        out = torch.func.functional_call(net, (parameters | fixed, dict(net.named_buffers())), (x[None],))
        return functional.cross_entropy(out, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return torch.stack([g.detach().flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt().double().numpy()


def bounds(net, x, y):
    watch = GradientNormBounds(SIZE)
    with watch.following(net):
        loss = functional.cross_entropy(net(x), y)
    found = watch.of(loss)
    assert not any(layer._forward_hooks for layer in net)
    assert all(p.grad is None for p in net.parameters())
    return found


def test_of_linear_layers_they_are_the_norms_of_the_samples_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(SIZE, 6), torch.arange(SIZE) % 3
    np.testing.assert_allclose(bounds(net, x, y), exact(net, x, y), rtol=1e-4)


def test_of_shared_weights_they_are_an_upper_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = torch.randn(SIZE, 1, 4, 4), torch.arange(SIZE) % 3
    x[4] *= 100
    found, norms = bounds(net, x, y), exact(net, x, y)
    # A kernel meets each value at 9 places at most, and its own sum over places is what the bound leaves out.
    assert (3 * found >= norms).all()
    assert found.argmax() == norms.argmax() == 4


def test_none_without_a_layer_that_could_be_watched():
    watch = GradientNormBounds(SIZE)
    assert watch.of(torch.ones((), requires_grad=True)) is None
