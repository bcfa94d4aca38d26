"""Checks of constructor arguments: each returns the value, or raises an error that says what to do."""

import math
from pathlib import Path

from lightning_spike.errors import ConfigurationError


def whole_number(name: str, value: object, *, at_least: int, do: str) -> int:
    """Returns a whole number of at least `at_least`.

    Raises:
        ConfigurationError: The value is smaller, or a float, string or boolean.
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
    """Returns a finite number above `above`, of at least `at_least` and at most `at_most`.

    Raises:
        ConfigurationError: The value is out of range, not finite, or a string or boolean.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):  # noqa: SIM102 - mypy
        if above < value and at_least <= value <= at_most:
            return float(value)
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"<= {at_most:g}"] * (at_most < math.inf)
    raise ConfigurationError.of(name, expected=f"a number {' and '.join(bounds)}".strip(), given=value, do=do)


def switch(name: str, value: object, *, do: str) -> bool:
    """Returns True or False.

    Raises:
        ConfigurationError: The value is not a boolean.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError.of(name, expected="True or False", given=value, do=do)


def directory(name: str, value: object) -> Path | None:
    """Returns the path of an output folder, which need not exist; `None` for the default one.

    Raises:
        ConfigurationError: The value is no path, or a file has that name.
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
    """Returns a path in a batch, keys and positions joined by dots; `None` for the default.

    Raises:
        ConfigurationError: The value is neither a string nor None.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    raise ConfigurationError.of(
        name,
        expected="a path in the batch, or None",
        given=value,
        do='Join keys and positions by dots: "labels", "1.y".',
    )
