import random

import numpy as np
import torch

from lightning_spike.signals.random_state import RandomState


def draw() -> tuple[float, float, float, list[float]]:
    # the global generators are meant
    python, gauss, legacy = random.random(), random.gauss(), np.random.standard_normal()  # noqa: S311, NPY002
    return python, gauss, float(legacy), torch.rand(3).tolist()


def test_all_generators_come_back():
    state = RandomState.take()
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


def test_taking_it_draws_nothing():
    state = RandomState.take()
    first = draw()
    state.restore()
    RandomState.take()
    assert draw() == first


def test_a_state_does_not_change_when_the_generators_go_on():
    state = RandomState.take()
    before = state.torch.clone()
    draw()
    assert torch.equal(state.torch, before)


def test_a_device_that_is_gone_is_left_out():
    taken = RandomState.take()
    missing = f"cuda:{torch.cuda.device_count()}"
    state = RandomState(python=taken.python, numpy=taken.numpy, torch=taken.torch, devices={missing: taken.torch})
    first = draw()
    state.restore()
    assert draw() == first
