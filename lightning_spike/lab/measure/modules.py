"""Module by module: activations and gradients of the batch of the onset, beside those of an ordinary batch under healthy weights."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

TOLD: Final = 8
"""Modules listed at most."""
CHANGED: Final = 3.0
"""Factor from which a module has changed; an engineering choice: ordinary batches differ by less."""
SATURATED: Final = {nn.Sigmoid: (0.01, 0.99), nn.Tanh: (-0.99, 0.99)}
"""Outputs beyond which next to no gradient comes through (a fiftieth of the steepest slope and less); an engineering choice."""
TINY: Final = 1e-30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What one module gave in one forward pass, and its gradient."""

    largest: float
    """Largest magnitude of its outputs."""
    rms: float
    """Root mean square of its outputs."""
    zeros: float
    """Share of outputs that are exactly 0: behind a ReLU, units that are dead for this batch."""
    saturated: float | None
    """Share of outputs of a sigmoid or tanh at its ends; `None` for other modules."""
    gradient: float | None
    """L2 norm of the gradient of the module's own parameters; `None` without any."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module, then and now."""

    module: str
    kind: str
    """Its class."""
    now: Activity
    """The batch of the onset under the weights at the onset."""
    usual: Activity
    """An ordinary batch under the snapshot's weights."""
    factor: float
    """By how much the one of largest output, RMS and gradient that changed most has changed, at least 1; infinite where it is not finite any more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleMeasures:
    """The modules that changed most."""

    modules: tuple[ModuleChange, ...]
    """At most eight, in the order of the forward pass."""
    first: str | None
    """The first in the forward pass whose outputs have changed by a factor of 3 or are not finite."""
    text: str


def measure_modules(
    sandbox: Sandbox, spike: RingEntry, ordinary: RingEntry, *, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> ModuleMeasures:
    """Run the batch of the onset under the new weights and an ordinary one under the old, in train mode; two forward and two backward passes.

    Args:
        sandbox: Inside `isolated`.
        spike: The batch of the onset.
        ordinary: Another one.
        old: Weights and buffers from before.
        new: Those at the onset.
    """
    now, usual = activities(sandbox, new, spike), activities(sandbox, old, ordinary)
    kinds = {name: type(part).__name__ for name, part in sandbox.module.named_modules()}
    changes = [
        ModuleChange(module=name, kind=kinds[name], now=now[name], usual=usual[name], factor=_factor(now[name], usual[name]))
        for name in now
        if name in usual
    ]  # fmt: skip
    most = sorted(changes, key=lambda c: -c.factor)[:TOLD]
    first = next((c for c in changes if _of_outputs(c.now, c.usual) >= CHANGED), None)
    return ModuleMeasures(
        modules=tuple(c for c in changes if c in most),
        first=None if first is None else first.module,
        text=_text(first, changes),
    )


def activities(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> dict[str, Activity]:
    """Of every module without children that gives floating tensors, by name, in the order of the forward pass; one forward and one backward pass.

    Gradients are taken without touching `.grad`, and are those of the undivided loss.
    """
    sandbox.rewind()
    load_module(sandbox.module, weights)
    watch = _Watch()
    with watch.following(sandbox.module):
        loss = loss_of(sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at))
    gradients = _gradients(sandbox.module, loss)
    return {name: seen.activity(gradients.get(name)) for name, seen in watch.seen.items()}


class _Seen:
    """The outputs of one module, added up over its calls."""

    def __init__(self, ends: tuple[float, float] | None) -> None:
        self._ends = ends
        self._largest = 0.0
        self._squares = self._zeros = self._at_ends = 0.0
        self._count = 0

    def add(self, output: Tensor) -> None:
        values = output.detach().double()
        self._largest = max(self._largest, float(values.abs().nan_to_num(nan=math.inf).max()))
        self._squares += float(values.square().sum())
        self._zeros += float((values == 0).sum())
        if self._ends is not None:
            self._at_ends += float(((values < self._ends[0]) | (values > self._ends[1])).sum())
        self._count += values.numel()

    def activity(self, gradient: float | None) -> Activity:
        return Activity(
            largest=self._largest,
            rms=math.sqrt(self._squares / self._count),
            zeros=self._zeros / self._count,
            saturated=None if self._ends is None else self._at_ends / self._count,
            gradient=gradient,
        )


class _Watch:
    def __init__(self) -> None:
        self.seen: dict[str, _Seen] = {}

    @contextlib.contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        leaves = [(name, part) for name, part in module.named_modules() if not any(True for _ in part.children())]
        handles = [
            part.register_forward_hook(lambda part, _, output, name=name: self._note(name, part, output))
            for name, part in leaves
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, part: nn.Module, output: Any) -> None:  # noqa: ANN401 - as a module returns it
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                self.seen.setdefault(name, _Seen(SATURATED.get(type(part)))).add(leaf)


def _gradients(module: nn.Module, loss: Tensor | None) -> dict[str, float]:
    """The norm of each module's own parameters' gradient."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if loss is None or not loss.requires_grad or not named:
        return {}
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    squares: dict[str, float] = {}
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            owner = name.rpartition(".")[0]
            squares[owner] = squares.get(owner, 0.0) + float(dense.double().square().sum())
    return {owner: math.sqrt(square) for owner, square in squares.items()}


def _factor(now: Activity, usual: Activity) -> float:
    gradient = 1.0 if now.gradient is None or usual.gradient is None else _ratio(now.gradient, usual.gradient)
    return max(_of_outputs(now, usual), gradient)


def _of_outputs(now: Activity, usual: Activity) -> float:
    return max(_ratio(now.largest, usual.largest), _ratio(now.rms, usual.rms))


def _ratio(a: float, b: float) -> float:
    """How many times one is the other, whichever is larger."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    a, b = max(a, TINY), max(b, TINY)
    return max(a / b, b / a)


def _text(first: ModuleChange | None, changes: list[ModuleChange]) -> str:
    most = max(changes, key=lambda c: c.factor, default=None)
    if most is None:
        return "No module gave activations that could be measured."
    if most.factor < CHANGED:
        return f"No module's activations or gradients have changed by more than {most.factor:.2g} times."
    parts = []
    if first is not None:
        parts.append(
            f"The first module whose outputs are out of the ordinary is '{first.module}' ({first.kind}): root mean square "
            f"{first.now.rms:.3g}, usually {first.usual.rms:.3g}; largest {first.now.largest:.3g}, usually {first.usual.largest:.3g}."
        )
    if most.now.gradient is not None and most.usual.gradient is not None and most is not first:
        parts.append(
            f"Changed most has '{most.module}' ({most.kind}): gradient norm {most.now.gradient:.3g}, usually {most.usual.gradient:.3g}."
        )
    dead = [c for c in changes if c.now.zeros >= 0.9 > c.usual.zeros and "ReLU" in c.kind]  # noqa: PLR2004 - nearly all
    parts += [
        f"Of the outputs of '{c.module}' {c.now.zeros:.0%} are zero, usually {c.usual.zeros:.0%}." for c in dead[:1]
    ]
    stuck = [c for c in changes if (c.now.saturated or 0.0) >= 0.5 > (c.usual.saturated or 0.0)]  # noqa: PLR2004 - most of them
    parts += [f"Of the outputs of '{c.module}' {c.now.saturated:.0%} are saturated." for c in stuck[:1]]
    return " ".join(parts) or f"'{most.module}' ({most.kind}) changed most, by {most.factor:.3g} times."
