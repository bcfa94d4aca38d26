import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import edit_batch, leaves_of, number_of_samples, some_of


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Encoding(dict):
    """A mapping of the user's own, with an attribute that must stay."""


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    label: torch.Tensor
    name: str = "a"


def one(*shape):
    return torch.ones(*shape)


def batches():
    encoding = Encoding(x=one(4), label=one(4))
    encoding.source = "web"
    return [
        (one(4, 2), one(4)),
        [one(4, 2), {"y": one(4), "n": None}],
        Pair(one(4), one(4)),
        {"a": {"b": [one(4), "text"]}, "label": one(4), 3: 7},
        encoding,
        Sample(one(4), one(4)),
        one(4),
    ]


@pytest.mark.parametrize("batch", batches(), ids=lambda b: type(b).__name__)
def test_the_structure_stays_and_the_original_is_not_touched(batch):
    before = repr(batch)
    edited = edit_batch(batch, lambda leaf: leaf.value + 1 if leaf.part is BatchPart.INPUT else leaf.value)
    assert repr(batch) == before
    assert type(edited) is type(batch)
    inputs, targets = leaves_of(edited, BatchPart.INPUT), leaves_of(edited, BatchPart.TARGET)
    assert all((leaf.value == 2).all() for leaf in inputs)
    assert all((leaf.value == 1).all() for leaf in targets)
    assert repr(edited).replace("2.", "1.") == before
    if isinstance(batch, Encoding):
        assert edited.source == "web"


def test_what_is_not_changed_is_the_same_object():
    inner = {"x": one(4), "thing": SimpleNamespace(a=1)}
    batch = {"in": inner, "label": one(4)}
    edited = edit_batch(batch, lambda leaf: leaf.value * 3 if leaf.part is BatchPart.INPUT else leaf.value)
    assert edited["label"] is batch["label"]
    assert edited["in"]["thing"] is inner["thing"]


def test_kinds_of_leaves_are_told_apart():
    batch = {
        "x": one(4),
        "tokens": torch.ones(4, dtype=torch.long),
        "mask": torch.ones(4, dtype=torch.bool),
        "y": one(4),
    }
    assert [leaf.name for leaf in leaves_of(batch, BatchPart.INPUT, floating=True)] == ["input.x"]
    assert [leaf.name for leaf in leaves_of(batch, BatchPart.INPUT, floating=False)] == ["input.tokens"]
    assert number_of_samples(batch) == 4
    assert number_of_samples({"n": 3}) == 0


def test_a_share_is_at_least_one_and_never_twice_the_same():
    generator = torch.Generator().manual_seed(0)
    assert len(some_of(10, 1e-9, generator, torch.device("cpu"))) == 1
    assert some_of(10, 1.0, generator, torch.device("cpu")).tolist() == list(range(10))
    assert len(set(some_of(10, 0.5, generator, torch.device("cpu")).tolist())) == 5
