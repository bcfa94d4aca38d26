"""Stand in for a method on one instance, several at a time, and take it off again in any order."""

import functools
from collections.abc import Callable
from typing import Any, Final

Call = Callable[..., Any]
Baselines = Callable[..., Any]

_AROUNDS: Final = "_lightning_spike_arounds"


def wrap(owner: object, name: str, around: Baselines) -> Callable[[], None]:
    """Let `around(call, *args, **kwargs)` stand in for `owner.<name>(*args, **kwargs)`; `call` is the method as it was.

    The stand-in lies on the instance, so that other instances of the class are left alone, and looks to
    `inspect.signature` (and to Lightning) like the method itself. Whoever wraps later stands outside. When the last
    `around` is taken off, the instance is as it was before the first.

    Args:
        owner: The object with the method.
        name: Of the method.
        around: What is called in its place.

    Returns:
        A function that takes it off; calling it again does nothing.
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


def _install(owner: object, name: str) -> list[Baselines]:
    original: Call = getattr(owner, name)
    arounds: list[Baselines] = []

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        call = original
        for around in arounds:
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    setattr(stand_in, _AROUNDS, arounds)
    stand_in._lightning_spike_before = vars(owner).get(name)  # type: ignore[attr-defined]  # noqa: SLF001 - what `_uninstall` puts back
    vars(owner)[name] = stand_in
    return arounds


def _uninstall(owner: object, name: str, arounds: list[Baselines]) -> None:
    """Where somebody else's wrapper stands outside ours by now, ours stays under it and only passes on."""
    current = vars(owner).get(name)
    if getattr(current, _AROUNDS, None) is not arounds:
        return
    before = current._lightning_spike_before  # type: ignore[union-attr]  # noqa: SLF001 - as above
    if before is None:
        del vars(owner)[name]
    else:
        vars(owner)[name] = before
