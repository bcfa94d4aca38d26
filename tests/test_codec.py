"""Records to plain data and back."""

import dataclasses
import json
import math
from enum import StrEnum
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spike.codec import from_plain, to_plain
from lightning_spike.experiments import Experiments
from lightning_spike.records import Episode


class Colour(StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    colour: Colour
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] | None = None
    kind: Literal["a", "b"] = "a"


@given(st.builds(Experiments, episode=st.integers(), failed=st.just(())))
def test_experiments_come_back_as_they_were(found):
    back = from_plain(Experiments, json.loads(json.dumps(to_plain(found))))
    assert repr(back) == repr(found)  # NaN is not equal to itself


@given(st.from_type(Episode))
def test_episodes_come_back_as_they_were(episode):
    assert repr(from_plain(Episode, json.loads(json.dumps(to_plain(episode))))) == repr(episode)


def test_missing_keys_take_defaults_and_further_keys_are_passed_over():
    whole = from_plain(Whole, {"colour": "red", "parts": [{"name": "x", "later": 3}]})
    assert whole == Whole(colour=Colour.RED, parts=(Part(name="x"),))


def test_null_is_a_number_that_is_not_finite_where_a_number_must_be():
    assert math.isnan(from_plain(Part, {"name": "x", "size": None}).size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"parts": []}, "Whole: expected Whole with colour"),
        ({"colour": "blue"}, "Whole.colour: expected Colour, found 'blue'"),
        ({"colour": "red", "parts": [{"name": 3}]}, r"Whole.parts\[0\].name: expected str, found 3"),
        ({"colour": "red", "pair": [1]}, "Whole.pair"),
        ({"colour": "red", "pair": [True, 1.0]}, "Whole.pair"),
        ({"colour": "red", "kind": "c"}, "Whole.kind"),
        ([], r"Whole: expected Whole, found \[\]"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(content, message):
    with pytest.raises(ValueError, match=message):
        from_plain(Whole, content)
