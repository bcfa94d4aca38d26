import dataclasses
import json
import math
import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lightning_spike.actions.batch_dump import Unreadable, content_hash, load_dump, tensor_bytes, write_dump
from lightning_spike.signals.random_state import RandomState

Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - as collate functions give it


class Own:
    def __repr__(self) -> str:
        return "Own(3)"


class Breaks:
    def __repr__(self) -> str:
        raise RuntimeError


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    name: str


def write(path, batch, **facts):
    return write_dump(path / "dump", batch=batch, random=RandomState.take(), facts=facts)


def there_and_back(path, batch):
    write(path, batch)
    return load_dump(path / "dump").batch


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right)
    else:
        assert left == right


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    ).map(lambda dtype: torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype))
)
BATCHES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_any_structure_comes_back(tmp_path_factory, batch):
    assert_same(there_and_back(tmp_path_factory.mktemp("dump"), batch), batch)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([math.nan, math.inf, -math.inf, 0.0]),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.randn(4, 6).t(),
        torch.randn(1, 3).expand(5, 3),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
    ],
    ids=["nonfinite", "scalar", "empty", "transposed", "expanded", "complex", "conjugate"],
)
def test_any_tensor_comes_back(tensor, tmp_path):
    assert_same(there_and_back(tmp_path, [tensor])[0], tensor.resolve_conj())


def test_tensors_that_share_memory_come_back(tmp_path):
    whole = torch.arange(6.0)
    assert_same(there_and_back(tmp_path, (whole, whole, whole[2:])), (whole, whole, whole[2:]))


def test_keys_that_read_alike_are_kept_apart(tmp_path):
    batch = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "1": torch.zeros(2), 1: torch.ones(2)}
    assert_same(there_and_back(tmp_path, batch), batch)


def test_numpy_comes_back(tmp_path):
    back = there_and_back(tmp_path, {"a": np.arange(3, dtype=np.int16), "s": np.float64(0.1), "names": np.array(["x"])})
    np.testing.assert_array_equal(back["a"], np.arange(3))
    assert (back["a"].dtype, back["s"]) == (np.int16, 0.1)
    assert isinstance(back["names"], Unreadable)


def test_what_is_the_users_own_is_told_as_near_as_can_be(tmp_path):
    batch = [UserDict(x=1), Pair(1, 2), Sample(torch.ones(1), "n"), Own(), Breaks(), torch.eye(2).to_sparse()]
    mapping, pair, sample, own, breaks, sparse = there_and_back(tmp_path, batch)
    assert (mapping, pair, sample["name"], own.repr) == ({"x": 1}, (1, 2), "n", "Own(3)")
    assert own.class_name.endswith("Own")
    assert "RuntimeError" in breaks.repr
    assert isinstance(sparse, Unreadable)


def test_a_structure_that_holds_itself_can_be_written(tmp_path):
    batch: list[object] = [torch.ones(1)]
    batch.append(batch)
    assert torch.equal(there_and_back(tmp_path, batch)[0], torch.ones(1))


def test_random_states_come_back(tmp_path):
    write(tmp_path, None)

    def draw():
        # the global generators are meant
        python, legacy = random.random(), np.random.standard_normal()  # noqa: S311, NPY002
        return python, float(legacy), torch.rand(2).tolist()

    expected = draw()
    load_dump(tmp_path / "dump").random.restore()
    assert draw() == expected


def test_the_files_are_readable_without_this_package(tmp_path):
    size = write(tmp_path, {"x": torch.ones(2, 3)}, loss=math.nan, step=np.int64(3))
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name for f in files] == ["manifest.json", "tensors.safetensors"]
    assert size == sum(f.stat().st_size for f in files)
    manifest = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (manifest["loss"], manifest["step"]) == ("nan", 3)
    with safe_open(files[1], framework="np") as tensors:
        np.testing.assert_array_equal(tensors.get_tensor("batch.x"), np.ones((2, 3)))


def test_a_dump_is_whole_or_absent(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_spike.actions.batch_dump.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [torch.ones(1)])
    assert list(tmp_path.iterdir()) == []


def test_something_else_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "another", "format_version": 9}')
    with pytest.raises(ValueError, match="another"):
        load_dump(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_dump(tmp_path / "none")


def test_a_hash_names_the_content():
    first = content_hash([torch.arange(4), torch.ones(2)])
    assert first == content_hash([torch.arange(4), torch.ones(2)])
    others = [[torch.arange(4).int(), torch.ones(2)], [torch.arange(4).reshape(2, 2), torch.ones(2)], [torch.arange(4)]]
    assert first not in {content_hash(o) for o in others}


def test_bytes_of_a_batch():
    assert tensor_bytes({"x": torch.zeros(3, 4), "y": (np.zeros(5), "text", None)}) == 48 + 40
