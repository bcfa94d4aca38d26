"""Attributes of a module, copied and put back.

By value, into the containers that are there, plain enough to be written to a file.
"""

import collections
import copy
import pickle
import random

import numpy as np
import pytest
import torch
from lab.shapes import SHAPES
from sandbox.test_isolation import remains
from torch import nn
from torchmetrics import MeanMetric

from lightning_spike.record import attribute_state as own_state
from lightning_spike.record.attribute_state import copy_attributes, load_attributes

Point = collections.namedtuple("Point", ["x", "y"])  # noqa: PYI024 - the plain kind that users have too


class Record:
    __slots__ = ("mean", "names")

    def __init__(self):
        self.mean, self.names = torch.zeros(2), ["a"]


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.tied = [self.layer.weight, self.layer.weight.detach()[0]]
        self.gru = nn.GRU(2, 2)
        self.metric = MeanMetric()
        self.count, self.name, self.rate = 0, "first", 0.5
        self.hidden = torch.zeros(3)
        self.nested = {"seen": collections.Counter(), "last": [torch.zeros(1), (1, [2])], "f": len}
        self.recent = collections.deque(maxlen=3)
        self.labels, self.array, self.point = {1}, np.zeros(3), Point(1, [2])
        self.record = Record()
        self.twice = self.hidden
        self.generators = [torch.Generator(), np.random.default_rng(0), random.Random(0)]  # noqa: S311 - as users do


def spoil(module):
    module.count, module.name, module.new, module.hidden = 7, "second", 1, None
    module.nested["seen"].update("abc")
    module.nested["last"][0].add_(1)
    module.nested["last"][1][1].append(3)
    del module.nested["f"]
    module.recent.extend([1, 2])
    module.labels.add(2)
    module.array += 1
    module.point = Point(3, [4])
    module.record.mean.add_(1)
    module.record.names.append("b")
    module.metric.update(torch.ones(2))
    module.train(False)
    module.layer.weight.requires_grad_(False)
    torch_one, numpy_one, python_one = module.generators
    torch.rand(1, generator=torch_one), numpy_one.random(), python_one.random()


@pytest.mark.parametrize("through_a_file", [False, True])
def test_everything_is_as_it_was_and_can_be_again(through_a_file):
    module = Keeper()
    del module.nested["f"]
    before = remains(module)
    saved = copy_attributes(module)
    saved = pickle.loads(pickle.dumps(saved)) if through_a_file else saved  # noqa: S301 - our own
    containers = [module.nested, module.recent, module.labels, module.array, module.record, module.record.names]
    for _ in range(2):
        module.nested["f"] = len
        spoil(module)
        load_attributes(module, saved)
        assert remains(module) == before
        assert module.twice is module.hidden
        assert module.record.names == ["a"]
        assert module.record.mean.tolist() == [0, 0]
        assert isinstance(module.generators[2].random(), float)
    now = [module.nested, module.recent, module.labels, module.array, module.record, module.record.names]
    assert all(a is b for a, b in zip(containers, now, strict=True)), "others may hold them too"


def test_weights_are_none_of_it():
    module = Keeper()
    saved = copy_attributes(module)
    with torch.no_grad():
        module.layer.weight.add_(1)
    now = module.layer.weight.clone()
    load_attributes(module, saved)
    assert torch.equal(module.layer.weight, now)
    assert module.tied[0] is module.layer.weight
    assert all(a is b for a, b in zip(module.gru._flat_weights, module.gru.parameters(), strict=True))


def test_what_is_too_large_or_unregistered_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(own_state, "MAX_BYTES", 100)
    module = nn.Linear(1, 1)
    module.long, module.wide, module.small = list(range(1001)), torch.zeros(26), torch.zeros(25)
    module.side = [nn.Linear(1, 1)]
    saved = copy_attributes(module)
    assert saved.left_out == ("long", "wide", "side[0]")
    module.long.append(1)
    module.small.add_(1)
    load_attributes(module, saved)
    assert len(module.long) == 1002
    assert module.small.sum() == 0


def test_no_random_number_is_drawn_and_the_module_is_left_alone():
    module = Keeper()
    before = remains(module), torch.get_rng_state()
    copy_attributes(module)
    assert remains(module) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_of_users_come_back(shape):
    module = shape()
    saved = copy_attributes(module)
    twin = copy.deepcopy(remains(module))
    load_attributes(module, saved)
    assert remains(module) == twin
