import math

import pytest
import torch
from lab.attached import attached
from lab.measure.entries import entry
from lab.shapes import CLASSES, FEATURES, Plain
from torch import nn
from torch.nn import functional

from lightning_spike.diagnosis.judgement import first_changed_module
from lightning_spike.lab.measure.modules import activities, measure_modules
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import isolated


class Deep(Plain):
    def make(self):
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(),
            nn.Linear(8, CLASSES),
        )  # fmt: skip


def a_batch(scale=1.0):
    torch.manual_seed(2)
    return [scale * torch.randn(12, FEATURES), torch.arange(12) % CLASSES]


def test_they_are_what_the_layers_give_by_hand():
    module, (x, y) = Deep(), a_batch(3.0)
    weights = copy_module(module)
    with isolated(attached(module), module) as sandbox:
        found = activities(sandbox, weights, entry([x, y]))
        assert sandbox.steps == 1
    assert list(found) == [f"net.{k}" for k in range(7)]
    value = x
    for k, layer in enumerate(module.net):
        value = layer(value).detach()
        seen = found[f"net.{k}"]
        assert seen.largest == pytest.approx(value.abs().max().item())
        assert seen.rms == pytest.approx(value.square().mean().sqrt().item(), rel=1e-5)
        assert seen.zeros == pytest.approx((value == 0).float().mean().item())
    assert found["net.1"].zeros > 0
    tanh = module.net[:4](x)
    assert found["net.3"].saturated == pytest.approx((tanh.abs() > 0.99).float().mean().item())
    assert found["net.2"].saturated is None
    parameters = dict(module.net.named_parameters())
    # as torch.func takes it
    loss = lambda p: functional.cross_entropy(torch.func.functional_call(module.net, p, (x,)), y)  # noqa: E731
    gradients = torch.func.grad(loss)(parameters)
    for k in (0, 2, 4, 6):
        norm = math.hypot(gradients[f"{k}.weight"].norm().item(), gradients[f"{k}.bias"].norm().item())
        assert found[f"net.{k}"].gradient == pytest.approx(norm, rel=1e-5)
    assert found["net.1"].gradient is None
    assert all(p.grad is None for p in module.parameters())


def measured(spoil, scale=1.0):
    module = Deep()
    old = copy_module(module)
    new = {name: spoil(name, tensor.clone()) for name, tensor in old.items()}
    with isolated(attached(module), module) as sandbox:
        return measure_modules(sandbox, entry(a_batch(scale)), entry(a_batch()), old=old, new=new)


def test_the_first_in_the_forward_pass_is_named_and_not_only_what_follows():
    found = measured(lambda name, tensor: tensor * 50 if name == "net.2.weight" else tensor)
    assert first_changed_module(found).module == "net.2"
    assert first_changed_module(found).kind == "Linear"
    assert next(c for c in found.modules if c.module == "net.3").now.saturated > 0.5
    names = [change.module for change in found.modules]
    assert names == sorted(names)


def test_what_is_not_finite_has_changed_beyond_measure():
    found = measured(lambda name, tensor: tensor.fill_(math.nan) if name == "net.4.bias" else tensor)
    assert first_changed_module(found).module == "net.4"
    assert next(c for c in found.modules if c.module == "net.4").factor == math.inf


def test_dead_units_are_told():
    found = measured(lambda name, tensor: tensor - 100 if name == "net.0.bias" else tensor)
    assert next(c for c in found.modules if c.module == "net.1").now.zeros == 1.0


def test_nothing_has_changed():
    found = measured(lambda _, tensor: tensor)
    assert first_changed_module(found) is None
    assert all(change.factor == pytest.approx(1.0) for change in found.modules)
