"""Shares of gradients that underflow, counted by hand."""

import pytest
import torch

from lightning_spike.signals.precision import underflow


def test_zeros_and_small_ones_are_counted_apart():
    gradients = [torch.tensor([0.0, 1e-6, 1.0, 2.0]), torch.tensor([0.0, 0.0, -1e-7, -1e-7])]
    zeros, below = underflow(gradients, 1e-5)
    assert float(zeros) == pytest.approx(3 / 8)
    assert float(below) == pytest.approx(3 / 8)


def test_a_large_gradient_counts_by_its_size():
    large = torch.zeros(100_000)
    zeros, below = underflow([large, torch.full((100_000,), 1.0)], torch.tensor(1e-5))
    assert float(zeros) == pytest.approx(0.5, abs=1e-3)
    assert float(below) == 0.0


def test_nothing_to_count():
    assert underflow([], 1.0) is None
    assert underflow([torch.eye(2).to_sparse()], 1.0) is None
