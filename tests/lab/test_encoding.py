"""What goes through JSON and safetensors comes back as it was; what could not is refused when it is written."""

import collections
import dataclasses
import enum
import json
import math
import random
import types
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pack_sequence

from lightning_spike.errors import CannotReplay
from lightning_spike.lab import encoding
from lightning_spike.lab.encoding import Decoder, Encoder, TooLarge
from lightning_spike.signals.random_state import RandomState


class Pair(NamedTuple):
    left: object
    right: object


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: object
    y: int = 3


class Tokens(collections.UserDict):
    """As the tokenizers' output: a mapping with attributes of its own."""


class Graph:
    """An object of the user's own that holds itself."""

    def __init__(self):
        self.edges, self.whole = [(0, 1)], self


class Colour(enum.IntEnum):
    RED = 1


class Count(int):
    pass


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Under importlib mode a test module has no name that another import would find."""
    here = {f"{__name__}:{kind.__name__}": kind for kind in (Pair, Point, Tokens, Graph, Colour, Count)}
    find = encoding.find_class
    monkeypatch.setattr(encoding, "find_class", lambda name: here.get(name) or find(name))
    monkeypatch.setitem(encoding.sys.modules, __name__, types.SimpleNamespace(**{k.__name__: k for k in here.values()}))


def there_and_back(value, tmp_path):
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "batch"), allow_nan=False)
    save_file(encoder.tensors, tmp_path / "tensors")
    return Decoder(load_file(tmp_path / "tensors"), torch.device("cpu")).decode(json.loads(text))


SAME = {
    "scalars": [None, True, 0, -7, 10**30, 1.5, -0.0, "täxt", b"\x00\xff", 1 + 2j],
    "nested": {"a": [1, (2, {"b": None})], 3: {4: "int keys"}, (1, 2): "tuple keys"},
    "containers": [
        {1, 2},
        frozenset("ab"),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=4),
    ],
    "factory": collections.defaultdict(list, {1: [2]}),
    "named": Pair(1, [2]),
    "record": Point([1], 5),
    "mapping": Tokens({"ids": [1, 2]}),
    "enum": [Colour.RED, torch.float16, torch.Size([2, 3]), torch.device("cpu"), dict, Point],
    "subclass": Count(5),
    "many": list(range(100)),
    "long": tuple(range(100)),
    "range": [range(3), slice(1, None, 2)],
}


@pytest.mark.parametrize("case", SAME)
def test_plain_values_are_equal_and_of_the_same_type(case, tmp_path):
    value, back = SAME[case], there_and_back(SAME[case], tmp_path)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in back] == [type(item) for item in value]


def test_numbers_that_json_has_not_come_back(tmp_path):
    nan, inf, zero = there_and_back([math.nan, -math.inf, -0.0], tmp_path)
    assert math.isnan(nan)
    assert inf == -math.inf
    assert math.copysign(1, zero) == -1


TENSORS = {
    "plain": torch.randn(4, 3),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 5).T,
    "one in four": torch.randn(40)[::4],
    "expanded": torch.randn(1, 3).expand(5, 3),
    "slice of much": torch.randn(1000, 8)[3:5],
    "empty": torch.empty(0, 3),
    "number": torch.tensor(3.0),
    "bfloat16": torch.randn(3).bfloat16(),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "float8": torch.randn(3).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "nan": torch.tensor([math.nan, 1.0]),
    "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_come_back_to_the_bit_with_their_strides(case, tmp_path):
    value, back = TENSORS[case], there_and_back(TENSORS[case], tmp_path)
    raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (value, back)]
    assert torch.equal(*raw)
    assert (type(back), back.dtype, back.shape, back.requires_grad) == (
        type(value),
        value.dtype,
        value.shape,
        value.requires_grad,
    )
    assert case == "one in four" or back.stride() == value.stride()


@pytest.mark.parametrize(
    "value",
    [np.arange(6).reshape(2, 3), np.array(["a", "bcd"]), np.float32(2.5), np.array(7), np.array([], dtype="<M8[D]")],
    ids=repr,
)
def test_arrays_come_back(value, tmp_path):
    back = there_and_back(value, tmp_path)
    assert type(back) is type(value)
    assert back.dtype == value.dtype
    assert np.array_equal(back, value)


def test_what_is_one_thing_is_one_thing_again_and_what_is_equal_is_not(tmp_path):
    tensor, rows, graph = torch.ones(3), [1], Graph()
    back = there_and_back([tensor, tensor, tensor.clone(), rows, rows, [1], graph], tmp_path)
    assert back[0] is back[1]
    assert back[2].data_ptr() != back[0].data_ptr()
    assert back[3] is back[4]
    assert back[5] is not back[3]
    assert back[6].whole is back[6]


def test_the_same_content_is_written_once(tmp_path):
    encoder = Encoder()
    encoder.encode([torch.ones(1000) for _ in range(10)], "batch")
    assert encoder.nbytes == 4000
    assert len(encoder.tensors) == 1


def test_a_slice_of_a_data_set_does_not_bring_the_data_set():
    encoder = Encoder()
    encoder.encode(torch.randn(100_000)[5:9], "batch")
    assert [t.untyped_storage().nbytes() for t in encoder.tensors.values()] == [16]


def test_random_states_and_generators_go_on_alike(tmp_path):
    own = random.Random(3)  # noqa: S311
    state, generator = there_and_back([RandomState.take(), own], tmp_path)
    drawn = random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002, S311 - the global ones
    state.restore()
    assert (random.random(), np.random.random()) == drawn[:2]  # noqa: NPY002, S311
    assert torch.equal(torch.rand(3), drawn[2])
    assert generator.random() == own.random()


def test_packed_sequences_come_back(tmp_path):
    value = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    back = there_and_back(value, tmp_path)
    assert type(back) is type(value)
    assert torch.equal(back.data, value.data)
    assert torch.equal(back.batch_sizes, value.batch_sizes)


class Local:
    def __init__(self, value):
        self.value = value


def _local():
    class Hidden:
        pass

    return Hidden()


REFUSED = {
    "function": (lambda: 0, "function"),
    "generator": ((k for k in range(3)), "generator"),
    "sparse": (torch.eye(3).to_sparse(), "sparse"),
    "meta": (torch.empty(3, device="meta"), "empty of data"),
    "object array": (np.array([object()]), "objects"),
    "local class": (_local(), "cannot import"),
    "weak reference": (weakref.ref(Local), "weakref"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_come_back_is_refused_by_its_place(case):
    value, said = REFUSED[case]
    with pytest.raises(CannotReplay, match=r"batch\.image\.1") as error:
        Encoder().encode({"image": [1, value]}, "batch")
    assert said in str(error.value)


def test_a_structure_without_end_is_refused():
    endless = []
    for _ in range(500):
        endless = [endless]
    with pytest.raises(CannotReplay, match="too deeply"):
        Encoder().encode(endless, "batch")


def test_more_than_the_limit_is_refused():
    with pytest.raises(TooLarge, match=r"more than 0\.001 MB"):
        Encoder(1000).encode([torch.ones(100), torch.zeros(200)], "batch")


def test_a_field_that_came_later_has_its_default():
    node = Encoder().encode(Point([1], 5), "point")
    del node["fields"]["y"]
    assert Decoder({}, torch.device("cpu")).decode(node) == Point([1], 3)


@pytest.mark.parametrize("name", ["no.such.module:Class", "collections:NoSuchClass", "os:getcwd"])
def test_a_class_that_is_not_there_is_said(name):
    with pytest.raises(CannotReplay, match=name):
        Decoder({}, torch.device("cpu")).decode({"kind": "record", "class": name, "fields": {}})


def test_reading_calls_no_constructor(tmp_path):
    """Neither what a file names, nor what it brings along, is run."""
    node = {
        "kind": "object",
        "class": "subprocess:Popen",
        "arguments": [],
        "state": {"kind": "dict", "items": [["returncode", 0], ["_child_created", False]]},
    }
    made = Decoder({}, torch.device("cpu")).decode(node)
    assert not hasattr(made, "pid")
