"""Compares each module's activations and gradients on the onset's batch with those of a control batch."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_spike.diagnosis.judgement import CHANGED_OUTPUTS, factor_between, outputs_changed
from lightning_spike.experiments import ModuleActivity, ModuleChange, ModuleMeasurement
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

MAX_MODULES: Final = 8
"""Modules listed at most; engineering choice."""
SATURATED: Final = {nn.Sigmoid: (0.01, 0.99), nn.Tanh: (-0.99, 0.99)}
"""Outputs beyond which next to no gradient comes through (a fiftieth of the steepest slope and less); an engineering
choice."""


def measure_modules(
    sandbox: Sandbox, spike: RingEntry, ordinary: RingEntry, *, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> ModuleMeasurement:
    """Runs the onset's batch under the new weights and a control batch under the old, in train mode.

    It takes two forward and two backward passes.

    Args:
        sandbox: Inside `isolated`.
        spike: The onset's batch.
        ordinary: A control batch.
        old: Weights and buffers of the snapshot.
        new: Weights and buffers at the onset.
    """
    now, usual = activities(sandbox, new, spike), activities(sandbox, old, ordinary)
    kinds = {name: type(part).__name__ for name, part in sandbox.module.named_modules()}
    changes = [
        ModuleChange(module=name, kind=kinds[name], now=own, usual=usual[name], factor=_factor(own, usual[name]))
        for name, own in now.items()
        if name in usual
    ]
    most = sorted(changes, key=lambda c: -c.factor)[:MAX_MODULES]
    first = next((c for c in changes if outputs_changed(c.now, c.usual) >= CHANGED_OUTPUTS), None)
    return ModuleMeasurement(modules=tuple(c for c in changes if c in most or c is first))


def activities(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> dict[str, ModuleActivity]:
    """Activity of every leaf module with floating outputs, by name, in the order of the forward pass.

    It takes one forward and one backward pass of the undivided loss and leaves every `.grad` unchanged.
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

    def activity(self, gradient: float | None) -> ModuleActivity:
        return ModuleActivity(
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

    def _note(self, name: str, part: nn.Module, output: Any) -> None:
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


def _factor(now: ModuleActivity, usual: ModuleActivity) -> float:
    """The largest factor by which outputs or gradient changed, at least 1."""
    if now.gradient is None or usual.gradient is None:
        return outputs_changed(now, usual)
    return max(outputs_changed(now, usual), factor_between(now.gradient, usual.gradient))
