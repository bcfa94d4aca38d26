import math
from pathlib import Path

import pytest

from lightning_spike.arguments import directory, number, switch, whole_number
from lightning_spike.errors import ConfigurationError


@pytest.mark.parametrize("bad", [0, -1, 1.0, "3", True, None, math.nan])
def test_whole_number_refuses_and_says_what_was_given(bad):
    with pytest.raises(ConfigurationError) as caught:
        whole_number("X(n)", bad, at_least=1, do="Use 3.")
    message = str(caught.value)
    assert message.startswith("X(n): expected a whole number >= 1")
    assert repr(bad) in message
    assert message.endswith("Use 3.")


def test_whole_number_returns_what_is_good():
    assert whole_number("X(n)", 7, at_least=7, do="") == 7


@pytest.mark.parametrize("bad", [0, 2.5, math.inf, math.nan, "0.5", False, None])
def test_number_refuses(bad):
    with pytest.raises(ConfigurationError, match="expected a number > 0 and <= 2"):
        number("X(r)", bad, above=0, at_most=2, do="Use 1.")


def test_number_may_have_a_lowest_value():
    assert number("X(r)", 0, at_least=0, do="") == 0.0
    with pytest.raises(ConfigurationError, match="expected a number >= 0, was given -1"):
        number("X(r)", -1, at_least=0, do="")


def test_number_returns_a_float():
    assert number("X(r)", 2, above=0, at_most=2, do="") == 2.0


@pytest.mark.parametrize("bad", [0, 1, "true", None])
def test_switch_takes_only_booleans(bad):
    with pytest.raises(ConfigurationError, match="True or False"):
        switch("X(s)", bad, do="")


def test_directory_makes_nothing_and_refuses_a_file(tmp_path: Path):
    assert directory("X(d)", None) is None
    assert directory("X(d)", str(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigurationError, match="in the way"):
        directory("X(d)", tmp_path / "taken")
    with pytest.raises(ConfigurationError, match="path or None"):
        directory("X(d)", 3)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigurationError) as caught:
        switch("X(c)", "y" * 500, do="")
    assert len(str(caught.value)) < 200
