from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch

from lightning_spike.samples.batches import gather_samples, samples_in, take_samples

Pair = namedtuple("Pair", "image label")  # noqa: PYI024 - a user's batch
X, Y = torch.arange(20.0).reshape(4, 5), torch.arange(4)


class Encoding(UserDict):
    """As the tokenizers' `BatchEncoding`: a mapping that torch's tree functions take for a leaf."""


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        pytest.param((X, Y), 4, id="pair"),
        pytest.param({"a": [X, {"b": Y}], "weight": torch.tensor(2.0), "name": "train"}, 4, id="nested"),
        pytest.param(X.numpy(), 4, id="array"),
        pytest.param([[torch.zeros(3, 8, 8)] * 5, [{"boxes": torch.zeros(k, 4)} for k in range(5)]], 5, id="detection"),
        pytest.param(Encoding(input_ids=X, mask=X), 4, id="encoding"),
        pytest.param({"text": "hello", "n": 3}, None, id="none"),
    ],
)
def test_the_number_of_samples_is_found(batch, size):
    assert samples_in(batch) == size


def test_all_that_belongs_to_a_sample_is_taken_and_the_rest_is_kept():
    batch = {
        "pair": Pair(X, Y),
        "names": ["a", "b", "c", "d"],
        "array": X.numpy(),
        "encoding": Encoding(ids=X),
        "classes": torch.arange(7),
        "scalar": torch.tensor(3.0),
        "flag": True,
    }
    taken = take_samples(batch, [2, 0])
    assert type(taken["pair"]) is Pair
    assert torch.equal(taken["pair"].image, X[[2, 0]])
    assert taken["pair"].label.tolist() == [2, 0]
    assert taken["names"] == ["c", "a"]
    assert np.array_equal(taken["array"], X.numpy()[[2, 0]])
    assert type(taken["encoding"]) is Encoding
    assert torch.equal(taken["encoding"]["ids"], X[[2, 0]])
    assert taken["classes"].tolist() == list(range(7))
    assert taken["scalar"] == 3
    assert taken["flag"] is True


def test_a_pair_of_tensors_of_a_batch_of_two_is_not_taken_for_a_list_of_two_samples():
    taken = take_samples([X[:2], Y[:2]], [1])
    assert torch.equal(taken[0], X[1:2])
    assert taken[1].tolist() == [1]


def test_the_samples_are_copies():
    taken = take_samples((X.clone(), Y), [0])
    taken[0].zero_()
    assert X[0].sum() == 10


def test_a_batch_without_a_length_is_refused():
    with pytest.raises(ValueError, match="number of samples"):
        take_samples({"text": "hello"}, [0])


def test_a_batch_is_made_of_samples_of_several():
    first = {"x": X, "y": Y, "names": ["a", "b", "c", "d"], "encoding": Encoding(ids=X.numpy()), "flag": True}
    second = {"x": X[:2] + 100, "y": Y[:2] + 7, "names": ["e", "f"], "encoding": Encoding(ids=-X.numpy()[:2])}
    made = gather_samples([first, second | {"flag": False}], [(1, 1), (0, 3), (1, 0)])
    assert torch.equal(made["x"], torch.stack([X[1] + 100, X[3], X[0] + 100]))
    assert made["y"].tolist() == [8, 3, 7]
    assert made["names"] == ["f", "d", "e"]
    assert np.array_equal(made["encoding"]["ids"], np.stack([-X.numpy()[1], X.numpy()[3], -X.numpy()[0]]))
    assert made["flag"] is True


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((torch.zeros(4, 6), Y), id="padded-to-another-length"),
        pytest.param({"x": X, "y": Y}, id="another-structure"),
        pytest.param("text", id="no-samples"),
    ],
)
def test_batches_that_do_not_fit_together_are_not_mixed(other):
    assert gather_samples([(X, Y), other], [(0, 0), (1, 0)]) is None
