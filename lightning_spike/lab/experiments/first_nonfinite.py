"""Finds the module and operation that made the first NaN or Inf.

The input, a module's operation, the loss or the backward pass, found by running the batch again.
"""

import bisect
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_spike.experiments import FirstNonFinite, Phase
from lightning_spike.records import Moment
from lightning_spike.sandbox.isolation import Sandbox, loss_of
from lightning_spike.signals.random_state import RandomState

LOSS_MODULES: Final = "torch.nn.modules.loss"
"""Python module of torch's loss classes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Birth:
    operation: str
    place: str | None
    """`None` outside of all modules."""
    entered: int
    """Number of modules entered before."""
    meant: bool = False
    """An infinity that the code wrote itself, as in `masked_fill(mask, -inf)`."""


def first_nonfinite(
    sandbox: Sandbox, batch: object, batch_idx: int, *, random: RandomState | None = None, at: Moment | None = None
) -> FirstNonFinite | None:
    """Run the batch with the weights that are in the module now, and find where its first non-finite value comes from.

    A value counts if the loss (or a gradient) that is not finite descends from it: a `log(0)` that is masked out later
    is none, an infinity that is written on purpose (`masked_fill(mask, -inf)`) neither, but the softmax that makes NaN
    of it is.

    Every operation is checked, so this takes many times as long as a step, and blocks. Gradients are taken with
    `torch.autograd.grad`, so that neither `.grad` nor hooks behind it are touched; the loss is not scaled, so an
    overflow by fp16's loss scale alone is not seen.

    Args:
        sandbox: Inside `isolated`; its state is where the step leaves it.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before its forward pass.
        at: Where in the run it was, as for `Sandbox.step`.

    Returns:
        The origin; `None` if loss and gradients are finite, if there is no loss, or if the weights are not finite
        already.
    """
    if not weights_are_finite(sandbox.module):
        return None
    places = _Places()
    watch = _Watch(places)
    with places.following(sandbox.module), watch:
        loss = loss_of(sandbox.step(batch, batch_idx, random=random, at=at))
    if loss is None:
        return None
    if not _is_finite(loss):
        return _of_input(batch) or _of_birth(watch.birth_of(loss), places)
    return _of_backward(loss, sandbox.module, places)


def weights_are_finite(module: nn.Module) -> bool:
    """Whether all parameters and buffers are. Blocks."""
    return all(_is_finite(tensor) for tensor in (*module.parameters(), *module.buffers()))


# -- the input ---------------------------------------------------------------------------------------------------------


def _of_input(batch: object) -> FirstNonFinite | None:
    leaves, _ = pytree.tree_flatten_with_path(batch)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor) and not _is_finite(leaf):
            where, count = pytree.keystr(path), int((~torch.isfinite(leaf)).sum())
            return FirstNonFinite(phase="input", module=None, operation=f"batch{where}", count=count)
    return None


# -- forward and loss --------------------------------------------------------------------------------------------------


class _Places:
    """Which module is at work, now and at any node of the autograd graph."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered = 0
        self.last_of_model = 0
        self.names_of_losses: set[str] = set()
        self._since: list[int] = []
        self._who: list[str | None] = []

    def now(self) -> str | None:
        return self.stack[-1] if self.stack else None

    def at(self, sequence: int) -> str | None:
        """The module that made the node with this number in autograd's order."""
        index = bisect.bisect_right(self._since, sequence) - 1
        return self._who[index] if index >= 0 else None

    @contextlib.contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Follow the forward pass by hooks on every module."""
        handles: list[Any] = []
        for name, part in module.named_modules():
            shown = name.replace("_orig_mod.", "").replace("._orig_mod", "")
            if type(part).__module__ == LOSS_MODULES:
                self.names_of_losses.add(shown)
            handles.append(part.register_forward_pre_hook(lambda *_, name=shown: self._enter(name)))
            handles.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self.stack.append(name)
        self.entered += 1
        if name not in self.names_of_losses:
            self.last_of_model = self.entered
        self._mark()

    def _leave(self) -> None:
        self.stack.pop()
        self._mark()

    def _mark(self) -> None:
        # the only clock that nodes carry
        self._since.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._who.append(self.now())


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every value that is not finite back to the operation that made it."""

    def __init__(self, places: _Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places
        self._births: dict[
            int, tuple[_Birth | None, Tensor]
        ] = {}  # by memory, which is held so that it is not used again

    def birth_of(self, tensor: Tensor) -> _Birth | None:
        """The place that made this value's first non-finite ancestor."""
        return self._births.get(_memory(tensor), (None, tensor))[0]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, (Tensor, float))]
        bad = [leaf for leaf in inputs if not _is_finite(leaf)]
        had_nan = any(_has_nan(leaf) for leaf in bad)
        result = func(*args, **(kwargs or {}))
        for output in pytree.tree_leaves(result):
            if isinstance(output, Tensor) and not _is_finite(output):
                birth = self._birth(func.overloadpacket.__name__, bad, makes_nan=_has_nan(output) and not had_nan)
                self._births[_memory(output)] = (birth, output)
        return result

    def _birth(self, operation: str, bad: list[Tensor | float], *, makes_nan: bool) -> _Birth | None:
        parents = [self._births.get(_memory(leaf), (None, leaf))[0] for leaf in bad if isinstance(leaf, Tensor)]
        known = [parent for parent in parents if parent is not None]
        unmeant = [parent for parent in known if not parent.meant]
        if unmeant:
            return unmeant[0]
        here = _Birth(operation, self._places.now(), self._places.entered, meant=bool(bad) and not makes_nan)
        return here if makes_nan or not known else known[0]


def _of_birth(birth: _Birth | None, places: _Places) -> FirstNonFinite | None:
    if birth is None:
        return None
    in_loss = birth.place is None or birth.place in places.names_of_losses
    phase: Phase = "loss" if in_loss and birth.entered >= places.last_of_model else "forward"
    return FirstNonFinite(phase=phase, module=birth.place or "", operation=birth.operation)


# -- backward ----------------------------------------------------------------------------------------------------------


def _of_backward(loss: Tensor, module: nn.Module, places: _Places) -> FirstNonFinite | None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters or not loss.requires_grad:
        return None
    culprits: list[Any] = []
    handles = [_watched(node, culprits) for node in _graph(loss.grad_fn)]
    try:
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if all(gradient is None or _is_finite(gradient) for gradient in gradients):
        return None
    operation = culprits[0].name() if culprits else None
    place = places.at(culprits[0]._sequence_nr()) if culprits else None  # as in `_mark`
    return FirstNonFinite(phase="backward", module=place or "", operation=operation)


def _graph(root: Any) -> Iterator[Any]:
    seen, to_see = {root}, [root]
    while to_see:
        node = to_see.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                to_see.append(parent)


def _watched(node: Any, culprits: list[Any]) -> Any:
    """Note the nodes that make something not finite of gradients that are, in the order in which they run."""

    def look(made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        if not all(g is None or _is_finite(g) for g in made) and all(g is None or _is_finite(g) for g in given):
            culprits.append(node)

    return node.register_hook(look)


# -- values ------------------------------------------------------------------------------------------------------------


def _is_finite(value: Tensor | float) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool(torch.isfinite(value.detach()).all())


def _has_nan(value: Tensor | float) -> bool:
    return math.isnan(value) if isinstance(value, float) else bool(torch.isnan(value.detach()).any())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
