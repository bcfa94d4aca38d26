"""Loss and gradient norm bound of every sample of a batch."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.samples.batches import samples_in, take_samples
from lightning_spike.sandbox.isolation import Sandbox, loss_of
from lightning_spike.signals.random_state import RandomState


class GradientNormBounds:
    """Upper bound of each sample's gradient norm from one forward and one backward pass.

    Per layer with weights: the norm of a sample's input times the norm of the loss's gradient by its output. The bound
    is the root of the sum of their squares. For a linear layer with one position per sample it is the norm of the
    sample's gradient without the bias (Goodfellow 2015, arXiv:1510.01799). For shared weights (sequences, convolutions
    up to the root of the kernel size) it is an upper bound. Compare it between samples of one module, in eval mode.

    Args:
        size: Samples in the batch. Ignores inputs and outputs whose first dimension is no multiple of it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Watch the forward passes inside."""
        layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        handles = [layer.register_forward_hook(self._note) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, loss: Tensor) -> npt.NDArray[np.float64] | None:
        """The bound of each sample for `loss`, their mean loss, shape `(size,)`; `None` without a watched layer.

        Takes gradients only by the layers' outputs, so no `.grad` changes. Blocks.
        """
        if not self._seen or not loss.requires_grad:
            return None
        gradients = torch.autograd.grad(loss, [output for _, output in self._seen], allow_unused=True)
        squares = torch.zeros(self._size, dtype=torch.float64)
        for (inputs, _), gradient in zip(self._seen, gradients, strict=True):
            if gradient is not None:
                squares += (inputs * self._squares(gradient)).cpu()
        return np.asarray(squares.sqrt().numpy(), dtype=np.float64) * self._size

    def _note(self, _: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        given, made = self._first(inputs), self._first(output)
        if given is not None and made is not None and made.requires_grad:
            whole = given.is_floating_point() or given.is_complex()
            squares = self._squares(given.detach()) if whole else torch.ones(self._size, device=given.device)
            self._seen.append((squares, made))

    def _first(self, values: object) -> Tensor | None:
        leaves = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
        return next((leaf for leaf in leaves if leaf.dim() and leaf.shape[0] and leaf.shape[0] % self._size == 0), None)

    def _squares(self, tensor: Tensor) -> Tensor:
        flat: Tensor = tensor.reshape(self._size, -1).double().square().sum(dim=1)
        return flat


MAX_SLICES: Final = 256
"""Samples that are run one by one; engineering choice."""

TOLERANCE: Final = 0.02
"""Relative difference between the batch's loss and the mean or sum of its samples' losses: low precision and masks
cause about one per cent, a loss that compares samples far more; engineering choice."""

TINY: Final = 1e-12
"""Absolute difference of equal losses; engineering choice."""

Losses = npt.NDArray[np.float64]
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PerSampleLosses:
    """The loss of every sample of one batch."""

    losses: Losses
    """Shape `(B,)`, float64; NaN and Inf are kept."""
    how: Literal["tap", "slices"]
    """`"tap"`: from the loss function in one run of the whole batch. `"slices"`: from a run per sample."""
    batch_loss: float
    """The loss of the whole batch."""
    explains: bool
    """Whether mean or sum of `losses` is the batch's loss up to 2 %; otherwise only their order counts. Always false
    for a non-finite loss."""
    gradient_bounds: Losses | None = None
    """Upper bound of each sample's gradient norm, shape `(B,)`; see `GradientNormBounds`."""


def samples_under(
    sandbox: Sandbox,
    weights: Mapping[str, Tensor] | None,
    batch: object,
    batch_idx: int,
    *,
    random: RandomState | None = None,
    trusting: bool = False,
    way: Literal["tap", "slices"] | None = None,
) -> PerSampleLosses | None:
    """Run a batch again in eval mode, and find loss and gradient norm bound of each sample; `None` where impossible.

    Taps the loss functions of `torch.nn.functional` during one run of the batch. Where the tap does not explain the
    loss (it is hand-written, or several are combined), runs the samples one by one, up to 256. Losses per token or
    pixel are averaged over the sample, without ignored positions; a flat `(B * T,)` loss is batch-first, as
    `.view(-1, V)` makes it. Takes a forward and a backward pass, or two forward passes and one per sample.

    Args:
        sandbox: Inside `isolated`; rewound first.
        weights: Parameters and buffers from `copy_module`; `None` for the present ones.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before the batch's forward pass.
        trusting: Accept the tap for a non-finite loss, as another batch has shown that it explains this module's loss.
        way: The only method to use, for comparison with earlier losses; the better one if not given.
    """
    run = _Run(sandbox=sandbox, batch=batch, batch_idx=batch_idx, random=random, weights=weights)
    size = samples_in(batch)
    if size is None:
        return None
    if way is not None:
        return _attempt(lambda: (_by_tap if way == "tap" else _by_slices)(run, size))
    tapped = _attempt(lambda: _by_tap(run, size))
    if tapped is not None and (tapped.explains or (trusting and not np.isfinite(tapped.batch_loss))):
        return tapped
    if not sandbox.has_room(passes=size):
        return tapped
    return _attempt(lambda: _by_slices(run, size)) or tapped


def held_samples_under(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, trusting: bool = False
) -> PerSampleLosses | None:
    """As `samples_under`, cached, for weights that stay unchanged as long as the sandbox."""
    key = (id(weights), id(entry), int(trusting))
    if key not in sandbox.cache:
        found = samples_under(sandbox, weights, entry.batch, entry.at.batch_idx, random=entry.rng, trusting=trusting)
        sandbox.cache[key] = found, (weights, entry)
    answer: PerSampleLosses | None = sandbox.cache[key][0]
    return answer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The batch to run, and its settings."""

    sandbox: Sandbox
    batch: object
    batch_idx: int
    random: RandomState | None
    weights: Mapping[str, Tensor] | None

    def reset(self) -> None:
        """Restore the initial state, without hooks, in eval mode."""
        self.sandbox.rewind()
        if self.weights is not None:
            load_module(self.sandbox.module, self.weights)
        self.sandbox.module.eval()

    def loss(self, part: object) -> Tensor | None:
        """The loss of the batch, or a part of it."""
        return loss_of(self.sandbox.step(part, self.batch_idx, random=self.random))


def _attempt(way: Callable[[], Answer | None]) -> Answer | None:
    """The result of a method; `None` if the user's step fails."""
    try:
        return way()
    except Exception:  # noqa: BLE001 - a user's step can raise anything
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Values:
    """Unreduced values of one loss function, shape `(B, values of a sample)`."""

    values: Tensor
    counts: Tensor
    """Which of them count, without ignored positions."""

    def samples(self) -> Losses:
        """The mean over each sample; 0 without a counted value."""
        means = self._counted().sum(dim=1) / self.counts.sum(dim=1).clamp(min=1)
        return np.asarray(means.cpu().numpy(), dtype=np.float64)

    def mean(self) -> float:
        """The mean over all counted values."""
        return float(self._counted().sum() / self.counts.sum())

    def _counted(self) -> Tensor:
        return torch.where(self.counts, self.values, 0.0)


class _Tap(TorchFunctionMode):
    """Records the unreduced values of every loss function of `torch.nn.functional`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.seen: list[_Values] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_loss_function(func):
            with torch.no_grad():
                values = _unreduced(func, args, kwargs or {}, self._size)
            if values is not None:
                self.seen.append(values)
        return func(*args, **(kwargs or {}))


def is_loss_function(function: object) -> bool:
    """Whether this is one of the losses of `torch.nn.functional`: a function there that takes a `reduction`."""
    name = getattr(function, "__name__", "")
    if getattr(functional, name, None) is not function or not callable(function):
        return False
    try:
        return "reduction" in inspect.signature(function).parameters
    except ValueError:  # a built-in without a signature is no loss
        return False


def _unreduced(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> _Values | None:
    """Values with `reduction="none"`; `None` where the shape does not assign them to samples."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments = {k: v for k, v in bound.arguments.items() if k not in ("reduce", "size_average")}
    bound.arguments["reduction"] = "none"
    values = function(*bound.args, **bound.kwargs).detach().double()
    if not values.dim() or not values.numel() or values.shape[0] % size:
        return None
    if values.shape[0] != size and values.dim() > 1:
        return None
    counts, target = torch.ones_like(values, dtype=torch.bool), bound.arguments.get("target")
    if "ignore_index" in inspect.signature(function).parameters and target is not None and target.shape == values.shape:
        counts = target != bound.arguments.get("ignore_index", -100)
    return _Values(values.reshape(size, -1), counts.reshape(size, -1))


def _by_tap(run: _Run, size: int) -> PerSampleLosses | None:
    tap, gradient_bounds = _Tap(size), GradientNormBounds(size)
    run.reset()
    with tap, gradient_bounds.following(run.sandbox.module):
        loss = run.loss(run.batch)
    if loss is None or not tap.seen:
        return None
    batch_loss = float(loss.detach())
    ways = [(values.samples(), values.mean()) for values in tap.seen]
    if len(ways) > 1:
        ways.append((np.sum([losses for losses, _ in ways], axis=0), sum(mean for _, mean in ways)))
    fits = [losses for losses, mean in ways if _explains(losses, mean, batch_loss)]
    likeliest = max(ways, key=lambda way: np.nan_to_num(way[1], nan=np.inf))[0]
    return PerSampleLosses(
        losses=fits[0] if fits else likeliest,
        how="tap",
        batch_loss=batch_loss,
        explains=bool(fits),
        gradient_bounds=_attempt(lambda: gradient_bounds.of(loss)),
    )


def _explains(losses: Losses, mean: float, batch_loss: float) -> bool:
    """Whether the batch's loss is the mean or sum of its samples' losses, or the mean of all values."""
    if not np.isfinite(batch_loss) or not np.isfinite(losses).all():
        return False
    room = TOLERANCE * abs(batch_loss) + TINY
    return any(abs(candidate - batch_loss) <= room for candidate in (mean, losses.mean(), losses.sum()))


def _by_slices(run: _Run, size: int) -> PerSampleLosses | None:
    if size > MAX_SLICES:
        return None

    def loss(part: object) -> float | None:
        run.reset()
        value = run.loss(part)
        return None if value is None else float(value.detach())

    whole = loss(run.batch)
    each = [loss(take_samples(run.batch, [index], size=size)) for index in range(size)]
    if whole is None or None in each:
        return None
    losses = np.array(each, dtype=np.float64)
    explains = _explains(losses, float(losses.mean()), whole)
    if not explains and np.isfinite(whole):
        return None  # the loss compares samples
    return PerSampleLosses(losses=losses, how="slices", batch_loss=whole, explains=explains)
