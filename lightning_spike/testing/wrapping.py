"""Wraps a method of one instance; wrappers can be removed in any order."""

import functools
from collections.abc import Callable
from typing import Any, Final

Call = Callable[..., Any]

_AROUNDS: Final = "_lightning_spike_arounds"


def wrap(owner: object, name: str, around: Call) -> Callable[[], None]:
    """Replaces `owner.<name>(*args, **kwargs)` by `around(call, *args, **kwargs)`; `call` is the original method.

    The wrapper is set on the instance, so other instances of the class are unaffected. It has the signature of the
    method. A later wrapper is outside of an earlier one. After the last one is removed, the instance is as before.

    Args:
        owner: The object with the method.
        name: Name of the method.
        around: Called in its place.

    Returns:
        A function that removes the wrapper; calling it again does nothing.
    """
    arounds = getattr(vars(owner).get(name), _AROUNDS, None)
    if arounds is None:
        arounds = _install(owner, name)
    arounds.append(around)

    def undo() -> None:
        if around in arounds:
            arounds.remove(around)
        if not arounds:
            _uninstall(owner, name, arounds)

    return undo


def _install(owner: object, name: str) -> list[Call]:
    original: Call = getattr(owner, name)
    arounds: list[Call] = []

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        call = original
        for around in arounds:
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    setattr(stand_in, _AROUNDS, arounds)
    stand_in._lightning_spike_before = vars(owner).get(name)  # type: ignore[attr-defined]  # noqa: SLF001 - ours
    vars(owner)[name] = stand_in
    return arounds


def _uninstall(owner: object, name: str, arounds: list[Call]) -> None:
    """Removes our wrapper; inside another one it stays and only passes calls on."""
    current = vars(owner).get(name)
    if getattr(current, _AROUNDS, None) is not arounds:
        return
    before = current._lightning_spike_before  # type: ignore[union-attr]  # noqa: SLF001 - as above
    if before is None:
        del vars(owner)[name]
    else:
        vars(owner)[name] = before
