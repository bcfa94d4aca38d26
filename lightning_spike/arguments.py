"""Checks of what a user hands to a constructor.

Each returns the value, or says what was expected, what was given and what to do.
"""

import math
from pathlib import Path

from lightning_spike.errors import ConfigurationError


def whole_number(name: str, value: object, *, at_least: int, do: str) -> int:
    """A whole number of at least `at_least`; a float, a string or a boolean is refused.

    Raises:
        ConfigurationError: It is not one.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return value
    raise ConfigurationError.of(name, expected=f"a whole number >= {at_least}", given=value, do=do)


def number(
    name: str,
    value: object,
    *,
    do: str,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """A finite number above `above`, of at least `at_least` and at most `at_most`; a string or a boolean is refused.

    Raises:
        ConfigurationError: It is not one.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):  # noqa: SIM102 - mypy
        if above < value and at_least <= value <= at_most:
            return float(value)
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"<= {at_most:g}"] * (at_most < math.inf)
    raise ConfigurationError.of(name, expected=f"a number {' and '.join(bounds)}".strip(), given=value, do=do)


def switch(name: str, value: object, *, do: str) -> bool:
    """True or False, and nothing that merely counts as one of them.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError.of(name, expected="True or False", given=value, do=do)


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


def batch_path(name: str, value: object) -> str | None:
    """Where something is in a batch, keys and positions joined by dots; `None` for what the convention says.

    Raises:
        ConfigurationError: It is neither.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    raise ConfigurationError.of(
        name,
        expected="a path in the batch, or None",
        given=value,
        do='Join keys and positions by dots: "labels", "1.y".',
    )
