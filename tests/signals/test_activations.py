"""Dead and saturated units, counted by hand on outputs that are made to be so."""

import pytest
import torch
from torch import nn

from lightning_spike.signals.activations import (
    Shape,
    activation_size,
    dead_units,
    first_tensor,
    saturated_share,
    shape_of,
)

ONE_SIDED = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.ELU(),
    nn.CELU(),
    nn.SELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Hardswish(),
]
TWO_SIDED = [nn.Sigmoid(), nn.Tanh(), nn.Softsign(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardtanh(-2.0, 3.0)]


@pytest.mark.parametrize("module", ONE_SIDED, ids=str)
def test_units_far_below_are_dead_and_others_are_not(module):
    """Four features: far below for all samples, below for half of them, at 1, at 2."""
    x = torch.tensor([[-12.0, -12.0, 1.0, 2.0], [-15.0, 1.0, 1.0, 2.0]])
    zeros, dead = dead_units(module, module(x))
    assert shape_of(module) is Shape.ONE_SIDED
    assert float(zeros) == pytest.approx(3 / 8)
    assert float(dead) == pytest.approx(1 / 4)


def test_of_an_image_a_channel_is_a_unit():
    out = torch.ones(2, 4, 3, 3)
    out[:, 1] = 0.0
    out[0, 2] = 0.0
    zeros, dead = dead_units(nn.ReLU(), out)
    assert float(zeros) == pytest.approx(1.5 / 4)
    assert float(dead) == pytest.approx(1 / 4)


@pytest.mark.parametrize("module", TWO_SIDED, ids=str)
def test_far_out_is_saturated(module):
    far = torch.full((3,), 500.0)
    x = torch.cat([far, -far, torch.tensor([0.1, -0.1])])
    assert shape_of(module) is Shape.TWO_SIDED
    assert float(saturated_share(module, module(x))) == pytest.approx(6 / 8)


def test_recurrent_layers_are_seen_by_their_state():
    layer = nn.GRU(2, 3, batch_first=True)
    out = first_tensor(layer(torch.randn(4, 5, 2)))
    assert out.shape == (4, 5, 3)
    assert float(saturated_share(layer, out)) == 0.0
    assert float(saturated_share(layer, torch.full((2, 2), 0.999))) == 1.0
    assert shape_of(nn.RNN(2, 3, nonlinearity="relu")) is Shape.OTHER


def test_size():
    out = torch.tensor([3.0, -4.0])
    size = activation_size(out)
    assert float(size.largest) == 4.0
    assert float(size.rms) == pytest.approx(12.5**0.5)
    assert activation_size(torch.tensor([1.0, float("nan")])).largest.isnan()
    assert float(activation_size(torch.tensor([300.0], dtype=torch.float16)).rms) == 300.0


def test_no_tensor_no_size():
    assert first_tensor({"a": None, "b": torch.ones(2, dtype=torch.long)}) is None
