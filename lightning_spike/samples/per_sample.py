"""Which samples of a batch make its loss what it is.

The loss of every sample by itself, and how hard each pulls at the weights.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_spike.errors import CannotReplay
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.samples.batches import samples_in, take_samples
from lightning_spike.sandbox.isolation import Sandbox, isolated, loss_of
from lightning_spike.signals.random_state import RandomState


class GradientNormBounds:
    """Watches the layers during one forward pass, and says afterwards what each sample's gradient can be at most.

    Of every layer with weights of its own: the norm of a sample's input times the norm of the loss's gradient by its
    output, squared and added up over the layers, and the root of it. For a linear layer with one position to a sample
    this is the norm of the sample's own gradient (Goodfellow 2015, arXiv:1510.01799; without the bias), for layers with
    shared weights (positions of a sequence, and up to the root of the kernel's size convolutions) an upper bound. It is
    to be compared between samples of one module, and costs one
    backward pass where the norms themselves cost one for each sample. No sample may see another: for eval mode.

    Args:
        size: Samples in the batch. What a layer takes or gives with no multiple of it in its first dimension is left
            out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Watch the forward passes in here."""
        layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        handles = [layer.register_forward_hook(self._note) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, loss: Tensor) -> npt.NDArray[np.float64] | None:
        """The pull of each sample at the sum of their losses, shape `(size,)`, taken for `size` times the loss, a mean; `None` where no layer was seen.

        Takes gradients by the layers' outputs only: no `.grad` is touched. Blocks.
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


MOST_SLICES: Final = 256
"""Samples that are run one by one at most; a larger batch would take longer than any answer is worth."""

TOLERANCE: Final = 0.02
"""How far, as a share, the mean (or sum) of the samples' losses may be from the batch's loss: low precision and masks
that differ between the samples move it by about a percent; a loss that compares samples with each other misses by far
more."""

TINY: Final = 1e-12
"""Two losses this close are equal, whatever their share."""

Losses = npt.NDArray[np.float64]
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PerSampleLosses:
    """The loss of every sample of one batch."""

    losses: Losses
    """Shape `(B,)`, float64; NaN and Inf are kept."""
    how: Literal["tap", "slices"]
    """`"tap"`: read off the loss function in one run of the whole batch, train mode and all. `"slices"`: every sample
    was run by itself in eval mode."""
    batch_loss: float
    """The loss of the whole batch in the same run, for `"slices"` in the same mode."""
    explains: bool
    """Whether mean or sum of `losses` is the batch's loss, up to 2 %; where it is not, other terms are part of the loss
    and the order of the samples is all there is.
    Always false where the loss is not finite: nothing can be compared then."""
    pulls: Losses | None = None
    """How hard each sample pulls at the weights, shape `(B,)`, where that was asked for and could be had; see
    `sample_pulls`."""


def per_sample_losses(
    trainer: Trainer, module: LightningModule, batch: object, batch_idx: int, *, random: RandomState | None = None
) -> PerSampleLosses | None:
    """Run a batch again and find the loss of each sample, with the weights as they are now.

    Leaves no trace (see `isolated`).

    First by a tap on the loss functions of `torch.nn.functional` during one run of the batch. Where the tap does not
    see the loss (it was written by hand) or sees several whose sum it is not, by slices: the samples run one by one in
    eval mode. Losses by token or pixel are averaged over the sample, those of ignored positions left out; a flat `(B *
    T,)` loss is taken to be batch-first, as `.view(-1, V)` makes it.

    Args:
        trainer: The trainer, between two batches.
        module: Its module.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before the batch's forward pass, for the same dropout; the present one where none is
            given.

    Returns:
        The losses; `None` where neither way works: the module cannot be run again, or not on single samples (the loss
        compares samples), or there are more than 256 of them.

    Blocks: it copies the module's state and reads the losses. For use after an episode.
    """
    try:
        with isolated(trainer, module) as sandbox:
            return _by_any_way(_Case(sandbox=sandbox, batch=batch, batch_idx=batch_idx, random=random))
    except CannotReplay:
        return None


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
    """As `per_sample_losses`, but in eval mode, so that no sample sees another through BatchNorm, and with the samples' pulls at the weights.

    One forward and one backward pass where the tap works, else two forward passes and one for each sample.

    Args:
        sandbox: Inside `isolated`; rewound first.
        weights: Parameters and buffers, as `copy_module` gives them; `None` for as they stand.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before the batch's forward pass.
        trusting: Take what the tap sees though the loss is not finite and proves nothing: another batch has shown that
            the tap sees this module's loss.
        way: The only way to take, so that the losses can be held against earlier ones; the better one where none is
            given.
    """
    case = _Case(sandbox=sandbox, batch=batch, batch_idx=batch_idx, random=random, weights=weights, in_eval=True)
    return _by_any_way(case, trusting=trusting, way=way)


def held_samples_under(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, trusting: bool = False
) -> PerSampleLosses | None:
    """As `samples_under`, for weights that are kept for as long as the sandbox is, unchanged.

    What was asked for once is remembered.
    """
    key = (id(weights), id(entry), int(trusting))
    if key not in sandbox.known:
        found = samples_under(sandbox, weights, entry.batch, entry.at.batch_idx, random=entry.rng, trusting=trusting)
        sandbox.known[key] = found, (weights, entry)
    answer: PerSampleLosses | None = sandbox.known[key][0]
    return answer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What is run, and how."""

    sandbox: Sandbox
    batch: object
    batch_idx: int
    random: RandomState | None
    weights: Mapping[str, Tensor] | None = None
    in_eval: bool = False

    def set_out(self, *, in_eval: bool) -> None:
        """Back to the beginning; takes hooks away too, so they come after it."""
        self.sandbox.rewind()
        if self.weights is not None:
            load_module(self.sandbox.module, self.weights)
        if in_eval:
            self.sandbox.module.eval()

    def loss(self, part: object) -> Tensor | None:
        """Of the batch, or a part of it."""
        return loss_of(self.sandbox.step(part, self.batch_idx, random=self.random))


def _by_any_way(
    case: _Case, *, trusting: bool = False, way: Literal["tap", "slices"] | None = None
) -> PerSampleLosses | None:
    size = samples_in(case.batch)
    if size is None:
        return None
    if way is not None:
        return _attempt(lambda: (_by_tap if way == "tap" else _by_slices)(case, size))
    tapped = _attempt(lambda: _by_tap(case, size))
    if tapped is not None and (tapped.explains or (trusting and not np.isfinite(tapped.batch_loss))):
        return tapped
    if not case.sandbox.has_room(passes=size):
        return tapped
    return _attempt(lambda: _by_slices(case, size)) or tapped


def _attempt(way: Callable[[], Answer | None]) -> Answer | None:
    """A step of the user's that fails when it is run again is an answer: this way does not work."""
    try:
        return way()
    except Exception:  # noqa: BLE001 - whatever a user's step raises; the caller says that there is no answer
        return None


# -- the tap
# -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Values:
    """What one loss function gave before it was reduced; both of shape `(B, values of a sample)`."""

    values: Tensor
    counts: Tensor
    """Which of them count: not the positions that the loss ignores."""

    def samples(self) -> Losses:
        """The mean over each sample; 0 for one of which nothing counts."""
        means = self._counted().sum(dim=1) / self.counts.sum(dim=1).clamp(min=1)
        return np.asarray(means.cpu().numpy(), dtype=np.float64)

    def mean(self) -> float:
        """The mean over all values that count."""
        return float(self._counted().sum() / self.counts.sum())

    def _counted(self) -> Tensor:
        return torch.where(self.counts, self.values, 0.0)


class _Tap(TorchFunctionMode):
    """Asks every loss function of `torch.nn.functional` for its values before they are reduced as well."""

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
    except ValueError:  # built in, without a signature: none of them is a loss
        return False


def _unreduced(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> _Values | None:
    """What the function gives with `reduction="none"`; `None` where the shape does not tell which value is whose."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments = {k: v for k, v in bound.arguments.items() if k not in ("reduce", "size_average")}
    bound.arguments["reduction"] = "none"
    values = function(*bound.args, **bound.kwargs).detach().double()
    if (
        values.dim() == 0
        or not values.numel()
        or values.shape[0] % size
        or (values.shape[0] != size and values.dim() > 1)
    ):
        return None
    counts, target = torch.ones_like(values, dtype=torch.bool), bound.arguments.get("target")
    if "ignore_index" in inspect.signature(function).parameters and target is not None and target.shape == values.shape:
        counts = target != bound.arguments.get("ignore_index", -100)
    return _Values(values.reshape(size, -1), counts.reshape(size, -1))


def _by_tap(case: _Case, size: int) -> PerSampleLosses | None:
    tap, pulls = _Tap(size), GradientNormBounds(size)
    case.set_out(in_eval=case.in_eval)
    with tap, pulls.following(case.sandbox.module) if case.in_eval else contextlib.nullcontext():
        loss = case.loss(case.batch)
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
        pulls=_attempt(lambda: pulls.of(loss)) if case.in_eval else None,
    )


def _explains(losses: Losses, mean: float, batch_loss: float) -> bool:
    """Whether the batch's loss is the mean or the sum of its samples' losses, or the mean of their parts."""
    if not np.isfinite(batch_loss) or not np.isfinite(losses).all():
        return False
    room = TOLERANCE * abs(batch_loss) + TINY
    return any(abs(candidate - batch_loss) <= room for candidate in (mean, losses.mean(), losses.sum()))


# -- the slices
# ----------------------------------------------------------------------------------------------------------


def _by_slices(case: _Case, size: int) -> PerSampleLosses | None:
    if size > MOST_SLICES:
        return None

    def loss(part: object) -> float | None:
        case.set_out(in_eval=True)
        value = case.loss(part)
        return None if value is None else float(value.detach())

    whole = loss(case.batch)
    each = [loss(take_samples(case.batch, [index], size=size)) for index in range(size)]
    if whole is None or None in each:
        return None
    losses = np.array(each, dtype=np.float64)
    explains = _explains(losses, float(losses.mean()), whole)
    if not explains and np.isfinite(whole):
        return None  # the loss compares samples with each other: alone they mean nothing
    return PerSampleLosses(losses=losses, how="slices", batch_loss=whole, explains=explains)
