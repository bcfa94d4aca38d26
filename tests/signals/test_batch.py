import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spike.signals.batch import (
    MAX_LEAVES,
    BatchRoles,
    batch_leaves,
    batch_signals,
    class_statistics,
    value_statistics,
    weight_statistics,
)

X, Y, W = torch.randn(4, 3), torch.arange(4), torch.rand(4)
Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - as collate functions give it


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


def names(batch, **roles: str) -> list[str]:
    return [leaf.name for leaf in batch_leaves(batch, BatchRoles(**roles))]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, ["input"]),
        ([X], ["input"]),
        ([X, Y], ["input", "target"]),
        ((X, W, Y), ["input.0", "input.1", "target"]),
        ((X, Y, None), ["input", "target"]),
        ((X, "name", 3, Y), ["input", "target"]),
        (Pair(X, Y), ["input", "target"]),
        ((X, (W, Y)), ["input.0", "input.1.0", "target"]),
        ({"image": X, "label": Y}, ["input.image", "target.label"]),
        ({"x": X, "y": Y, "sample_weight": W}, ["input.x", "target.y", "weight.sample_weight"]),
        (UserDict({"input_ids": Y, "labels": Y}), ["input.input_ids", "target.labels"]),
        (OrderedDict(x={"a": X, "b": W}, targets={"c": Y}), ["input.x.a", "input.x.b", "target.targets.c"]),
        (Sample(X, Y), ["input.image", "target.label"]),
        ((X, {"boxes": W, "classes": Y}), ["input", "target.1.boxes", "target.1.classes"]),
        (({"labels": Y, "ids": X},), ["target.0.labels", "input.0.ids"]),
        ({"a": [X, Y], "b": [X, Y]}, ["input.a.0", "target.a.1", "input.b.0", "target.b.1"]),
        (([X, X], [{"boxes": W}, {"boxes": W}]), ["input.0.0", "input.0.1", "target.1.0.boxes", "target.1.1.boxes"]),
        (None, []),
        ("text", []),
        (object(), []),
    ],
)
def test_which_part_is_what(batch, expected):
    assert names(batch) == expected


def test_the_convention_can_be_overridden():
    assert names((Y, X), target="0") == ["target", "input"]
    assert names({"a": X, "b": Y, "label": W}, target="b") == ["input.a", "target.b", "input.label"]
    assert names({"a": X, "b": {"u": Y, "v": W}}, target="b", weight="a") == ["weight.a", "target.b.u", "target.b.v"]


def test_a_structure_that_holds_itself_ends():
    batch: list[object] = [X]
    batch.append(batch)
    assert 1 <= len(batch_leaves(batch)) < 100


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        | st.sampled_from([np.nan, np.inf, -np.inf, 0.0]),
        min_size=1,
        max_size=50,
    )
)
def test_statistics_are_those_of_the_finite_part(values):
    array = np.array(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    told = {name: float(value) for name, value in value_statistics(torch.tensor(values, dtype=torch.float32)).items()}
    assert told["nonfinite"] == array.size - finite.size
    assert told["zeros"] == pytest.approx(np.mean(array == 0))
    assert told["max_abs"] == pytest.approx(np.abs(finite).max(initial=0.0))
    if finite.size:
        scale = np.abs(finite).max()
        assert told["mean"] == pytest.approx(finite.mean(), rel=1e-4, abs=1e-5 * scale)
        assert told["std"] == pytest.approx(finite.std(), rel=1e-3, abs=1e-5 * scale)
    else:
        assert np.isnan(told["mean"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_every_floating_dtype_is_measured(dtype):
    values = (torch.arange(64, dtype=torch.float32) - 20).to(dtype)
    told = value_statistics(values)
    reference = values.double().numpy()
    assert float(told["mean"]) == pytest.approx(reference.mean(), rel=1e-3)
    assert float(told["std"]) == pytest.approx(reference.std(), rel=1e-3)
    assert all(value.dtype in (torch.float32, torch.float64) and value.shape == () for value in told.values())


def test_a_large_offset_does_not_drown_the_spread():
    values = 1e4 + torch.randn(10_000, dtype=torch.float64)
    assert float(value_statistics(values.float())["std"]) == pytest.approx(float(values.std(correction=0)), rel=0.01)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.arange(3),
        torch.ones(2, dtype=torch.bool),
        torch.eye(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, device="meta"),
    ],
    ids=["empty", "integer", "boolean", "sparse", "complex", "meta"],
)
def test_what_has_no_floating_values_is_passed_over(tensor):
    assert value_statistics(tensor) == {}
    batch_signals((tensor, tensor))


def test_classes_of_an_integer_target_are_counted():
    told = batch_signals((X, torch.tensor([3, 3, 7, -1])))
    assert float(told["batch/target/distinct"]) == 3
    assert float(batch_signals((torch.arange(4), X))["batch/input/distinct"]) == 4
    assert not any("distinct" in name for name in batch_signals((torch.ones(4, dtype=torch.bool), X)))


def test_only_so_many_leaves_are_measured():
    told = batch_signals([X] * 40)
    assert len({name.split("/")[1] for name in told}) == MAX_LEAVES


def test_nothing_is_drawn_changed_or_waited_for():
    batch = {"x": torch.randn(8, 4, requires_grad=True), "label": torch.arange(8)}
    versions = [t._version for t in batch.values()]
    state = torch.get_rng_state()
    with torch.profiler.profile() as profile:
        told = batch_signals(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert [t._version for t in batch.values()] == versions
    assert not any(value.requires_grad for value in told.values())
    blocking = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert not blocking & {event.key for event in profile.key_averages()}


def test_the_users_demand_for_deterministic_kernels_is_met():
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert batch_signals((X, Y))
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_the_spread_of_classes_is_that_of_numpy():
    rng = np.random.default_rng(0)
    target = np.sort(rng.integers(0, 7, 200))
    counts = np.bincount(target, minlength=64)
    shares = counts[counts > 0] / 200
    told = class_statistics(torch.tensor(target))
    assert float(told["entropy"]) == pytest.approx(float(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert float(told["largest"]) == pytest.approx(shares.max())
    assert float(told["longest_run"]) == counts.max()
    np.testing.assert_array_equal(told["histogram"], counts)


@pytest.mark.parametrize(
    ("target", "run"), [([3], 1), ([1, 2, 3], 1), ([1, 1, 2, 2, 2, 1], 3), ([5, 5, 5], 3), ([1, 2, 2], 2)]
)
def test_the_longest_run(target, run):
    assert float(class_statistics(torch.tensor(target))["longest_run"]) == run


def test_weights_that_pile_up():
    even, one = torch.full((10,), 0.3), torch.tensor([0.0] * 9 + [7.0])
    assert float(weight_statistics(even)["ess"]) == pytest.approx(1.0)
    assert float(weight_statistics(even)["max_share"]) == pytest.approx(0.1)
    assert float(weight_statistics(one)["ess"]) == pytest.approx(0.1)
    assert float(weight_statistics(one)["max_share"]) == pytest.approx(1.0)
    mixed = torch.tensor([1.0, 2.0, 5.0])
    assert float(weight_statistics(mixed)["ess"]) == pytest.approx(64 / 30 / 3)
    assert weight_statistics(torch.zeros(3))["ess"].isnan()


def test_an_input_that_is_named_leaves_out_what_is_neither():
    batch = {"image": X, "mask": X, "label": Y}
    assert names(batch, input="image") == ["input.image", "target.label"]
    assert {"input.image", "input.mask"} < set(names(batch))
