"""Sizes of weights and of their changes against plain torch; fan scales against torch's own initialisations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_spike.signals.subset import MAX_ELEMENTS, subset
from lightning_spike.signals.weights import displacement, fan_scale, initial_scales, weight_sizes


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (300, 400))]


def test_sizes_are_those_of_numpy():
    weights = tensors()
    sizes = weight_sizes(weights)
    arrays = [w.double().numpy() for w in weights]
    np.testing.assert_allclose(sizes.norms, [np.linalg.norm(a) for a in arrays], rtol=1e-5)
    np.testing.assert_allclose(sizes.largest, [np.abs(a).max() for a in arrays], rtol=1e-6)
    np.testing.assert_allclose(sizes.total, np.sqrt(sum((a**2).sum() for a in arrays)), rtol=1e-5)


def test_changes_of_small_weights_are_exact_and_of_large_ones_estimated():
    weights = tensors()
    assert weights[2].numel() > MAX_ELEMENTS
    before = [subset(w).clone() for w in weights]
    whole = [w.clone() for w in weights]
    for weight in weights:
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    change = displacement(before, weights)
    true = [float((now - then).norm()) for then, now in zip(whole, weights, strict=True)]
    np.testing.assert_allclose(change.norms[:2], true[:2], rtol=1e-5)
    np.testing.assert_allclose(change.norms[2], true[2], rtol=0.02)
    np.testing.assert_allclose(change.total, math.hypot(*true), rtol=0.02)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 32),
        nn.Conv2d(16, 32, 3),
        nn.Conv1d(16, 32, 5),
        nn.LSTM(200, 32),
        nn.GRU(32, 64),
        nn.Embedding(100, 16),
        nn.MultiheadAttention(64, 4),
        nn.MultiheadAttention(64, 4, kdim=32, vdim=16),
    ],
    ids=["linear", "conv2d", "conv1d", "lstm", "gru", "embedding", "attention", "attention with three widths"],
)
def test_torchs_own_initialisations_lie_between_a_half_and_the_double(module):
    scaled = [(w, fan_scale(module, n, w)) for n, w in module.named_parameters(recurse=False)]
    found = [(w, s) for w, s in scaled if s is not None]
    assert found
    scales = initial_scales(*zip(*found, strict=True))
    assert ((scales > 0.4) & (scales < 2.0)).all(), scales


@pytest.mark.parametrize("init", [nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.orthogonal_])
def test_the_usual_initialisations_too(init):
    module = nn.Linear(128, 256)
    init(module.weight)
    scale = fan_scale(module, "weight", module.weight)
    assert 0.4 < float(initial_scales([module.weight], [scale])[0]) < 2.0


def test_what_has_no_fan_in_has_no_scale():
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    assert fan_scale(depthwise, "weight", depthwise.weight) is None
    assert fan_scale(nn.LayerNorm(8), "weight", torch.ones(8)) is None
    assert fan_scale(nn.Module(), "position", torch.randn(1, 10, 16)) is None
