"""Checks of what a user hands to a constructor: each returns the value, or says what was expected, what was given and what to do."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_spike.errors import ConfigurationError

__all__ = ["choice", "directory", "number", "switch", "whole_number"]


def whole_number(name: str, value: object, *, at_least: int, do: str) -> int:
    """A whole number of at least `at_least`; a float, a string or a boolean is refused.

    Raises:
        ConfigurationError: It is not one.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return value
    raise ConfigurationError.of(name, expected=f"a whole number >= {at_least}", given=value, do=do)


def number(name: str, value: object, *, do: str, above: float = -math.inf, at_most: float = math.inf) -> float:
    """A finite number in `(above, at_most]`; a string or a boolean is refused.

    Raises:
        ConfigurationError: It is not one.
    """
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and above < value <= at_most
    ):
        return float(value)
    low = f" > {above:g}" if above > -math.inf else ""
    high = f" <= {at_most:g}" if at_most < math.inf else ""
    raise ConfigurationError.of(
        name, expected=f"a number{low}{' and' if low and high else ''}{high}", given=value, do=do
    )


def switch(name: str, value: object, *, do: str) -> bool:
    """True or False, and nothing that merely counts as one of them.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError.of(name, expected="True or False", given=value, do=do)


def choice(name: str, value: object, allowed: Sequence[str], *, do: str) -> str:
    """One of a few words.

    Raises:
        ConfigurationError: It is none of them.
    """
    if isinstance(value, str) and value in allowed:
        return value
    raise ConfigurationError.of(name, expected=f"one of {', '.join(map(repr, allowed))}", given=value, do=do)


def directory(name: str, value: object) -> Path | None:
    """A folder that files may be put into, made when the first one is; `None` for the default place.

    Raises:
        ConfigurationError: It is no path, or something that is no folder stands there.
    """
    if value is None:
        return None
    if not isinstance(value, (str, Path)) or not str(value):
        raise ConfigurationError.of(
            name, expected="a folder's path or None", given=value, do="Leave it out for <log_dir>/spike."
        )
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigurationError.of(
            name, expected="a folder's path", given=value, do="A file of that name is in the way: choose another."
        )
    return path
