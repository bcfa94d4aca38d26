import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.measure.entries import entry
from lab.shapes import CLASSES, FEATURES, Plain
from torch import nn
from torch.nn import functional

from lightning_spike.lab.measure.samples import gradient_norms, measure_samples
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import isolated

SIZE = 12


class Nested(Plain):
    """Behind BatchNorm and dropout, from a nested batch."""

    def make(self):
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        )

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch["sample"]["x"]), batch["sample"]["y"])


class ByHand(Nested):
    """A loss that cannot be listened to."""

    def training_step(self, batch, batch_idx):
        logs = self.net(batch["sample"]["x"]).log_softmax(1)
        return -logs.gather(1, batch["sample"]["y"][:, None]).mean()


def a_batch(seed):
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randn(SIZE, FEATURES, generator=random), torch.randint(CLASSES, (SIZE,), generator=random)
    return {"sample": {"x": x, "y": y}, "names": [f"s{k}" for k in range(SIZE)], "version": 2}


def norms_by_torch(module, batch):
    """Per-sample gradients by `vmap(grad)`."""
    module.eval()
    parameters, buffers = dict(module.net.named_parameters()), dict(module.net.named_buffers())

    def loss(parameters, x, y):
        out = torch.func.functional_call(module.net, (parameters, buffers), (x[None],))
        return functional.cross_entropy(out, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, batch["sample"]["x"], batch["sample"]["y"]
    )
    module.train()
    return torch.stack([g.detach().flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt().numpy()


@pytest.mark.parametrize("kind", [Nested, ByHand])
def test_gradient_norms_are_those_of_torch_func(kind):
    torch.manual_seed(6)
    module, batch = kind(), a_batch(0)
    with isolated(attached(module), module) as sandbox:
        found = gradient_norms(sandbox, copy_module(module), entry(batch), [3, 0, 11])
        assert sandbox.steps == 3
    np.testing.assert_allclose(found, norms_by_torch(module, batch)[[3, 0, 11]], rtol=1e-4)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("kind", [Nested, ByHand])
def test_losses_and_the_hardest_pullers_beside_an_ordinary_batch(kind):
    torch.manual_seed(6)
    module, batch, ordinary = kind(), a_batch(0), a_batch(1)
    batch["sample"]["x"][7] *= 200
    batch["sample"]["x"][4] *= 100
    weights = copy_module(module)
    with isolated(attached(module), module) as sandbox:
        found = measure_samples(sandbox, entry(batch), entry(ordinary), weights)
        assert sandbox.steps == 7 if kind is Nested else 3 * SIZE
    module.eval()
    for told, b in ((found.losses, batch), (found.usual_losses, ordinary)):
        expected = functional.cross_entropy(module.net(b["sample"]["x"]), b["sample"]["y"], reduction="none")
        np.testing.assert_allclose(told, expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert (found.gradient_bounds is None) == (kind is ByHand)
    norms = norms_by_torch(module, batch)
    np.testing.assert_allclose(found.gradients, norms[list(found.hardest)], rtol=1e-4, atol=1e-6)
    if kind is Nested:
        assert set(np.argsort(-norms)[:2].tolist()) <= set(found.hardest)


def test_a_nan_in_one_sample_stays_there():
    torch.manual_seed(6)
    module, batch = Nested(), a_batch(0)
    batch["sample"]["x"][5, 2] = torch.nan
    with isolated(attached(module), module) as sandbox:
        found = measure_samples(sandbox, entry(batch), entry(a_batch(1)), copy_module(module))
    assert np.flatnonzero(~np.isfinite(found.losses)).tolist() == [5]
    assert found.hardest[0] == 5


def test_more_samples_than_can_be_run_are_no_answer():
    module = Plain()
    batch = [torch.randn(300, FEATURES), torch.arange(300) % CLASSES]
    with isolated(attached(module), module) as sandbox:
        assert measure_samples(sandbox, entry(batch), entry(batch), copy_module(module)) is None
