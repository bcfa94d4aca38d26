"""Which samples of a batch make its loss what it is: the loss of every sample by itself, and how hard each pulls at the weights."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.state_copy import load_module
from lightning_spike.lab.batches import samples_in, take_samples
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import Bench, isolated, loss_of
from lightning_spike.lab.sample_pulls import Pulls
from lightning_spike.signals.random_state import RandomState

__all__ = ["PerSampleLosses", "held_samples_under", "per_sample_losses", "samples_under"]

MOST_SLICES: Final = 256
"""Samples that are run one by one at most; a larger batch would take longer than any answer is worth."""

TOLERANCE: Final = 0.02
"""How far, as a share, the mean (or sum) of the samples' losses may be from the batch's loss: low precision and masks that differ between the samples move it by
about a percent; a loss that compares samples with each other misses by far more."""

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
    """`"tap"`: read off the loss function in one run of the whole batch, train mode and all. `"slices"`: every sample was run by itself in eval mode."""
    batch_loss: float
    """The loss of the whole batch in the same run, for `"slices"` in the same mode."""
    explains: bool
    """Whether mean or sum of `losses` is the batch's loss, up to 2 %; where it is not, other terms are part of the loss and the order of the samples is all there is.
    Always false where the loss is not finite: nothing can be compared then."""
    pulls: Losses | None = None
    """How hard each sample pulls at the weights, shape `(B,)`, where that was asked for and could be had; see `sample_pulls`."""


def per_sample_losses(
    trainer: Trainer, module: LightningModule, batch: object, batch_idx: int, *, random: RandomState | None = None
) -> PerSampleLosses | None:
    """Run a batch again and find the loss of each sample, with the weights as they are now; leaves no trace (see `isolated`).

    First by a tap on the loss functions of `torch.nn.functional` during one run of the batch. Where the tap does not see the loss (it was
    written by hand) or sees several whose sum it is not, by slices: the samples run one by one in eval mode. Losses
    by token or pixel are averaged over the sample, those of ignored positions left out; a flat `(B * T,)` loss is taken to be batch-first, as `.view(-1, V)` makes it.

    Args:
        trainer: The trainer, between two batches.
        module: Its module.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before the batch's forward pass, for the same dropout; the present one where none is given.

    Returns:
        The losses; `None` where neither way works: the module cannot be run again, or not on single samples (the loss compares samples), or there are more
        than 256 of them.

    Blocks: it copies the module's state and reads the losses. For use after an episode.
    """
    try:
        with isolated(trainer, module) as bench:
            return _by_any_way(_Case(bench=bench, batch=batch, batch_idx=batch_idx, random=random))
    except CannotReplay:
        return None


def samples_under(
    bench: Bench,
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
        bench: Inside `isolated`; rewound first.
        weights: Parameters and buffers, as `copy_module` gives them; `None` for as they stand.
        batch: The batch, on its device.
        batch_idx: As `training_step` takes it.
        random: The random state before the batch's forward pass.
        trusting: Take what the tap sees though the loss is not finite and proves nothing: another batch has shown that the tap sees this module's loss.
        way: The only way to take, so that the losses can be held against earlier ones; the better one where none is given.
    """
    case = _Case(bench=bench, batch=batch, batch_idx=batch_idx, random=random, weights=weights, in_eval=True)
    return _by_any_way(case, trusting=trusting, way=way)


def held_samples_under(
    bench: Bench, weights: Mapping[str, Tensor], entry: RingEntry, *, trusting: bool = False
) -> PerSampleLosses | None:
    """As `samples_under`, for weights that are kept for as long as the bench is, unchanged: what was asked for once is remembered."""
    key = (id(weights), id(entry), int(trusting))
    if key not in bench.known:
        found = samples_under(bench, weights, entry.batch, entry.at.batch_idx, random=entry.rng, trusting=trusting)
        bench.known[key] = found, (weights, entry)
    answer: PerSampleLosses | None = bench.known[key][0]
    return answer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What is run, and how."""

    bench: Bench
    batch: object
    batch_idx: int
    random: RandomState | None
    weights: Mapping[str, Tensor] | None = None
    in_eval: bool = False

    def set_out(self, *, in_eval: bool) -> None:
        """Back to the beginning; takes hooks away too, so they come after it."""
        self.bench.rewind()
        if self.weights is not None:
            load_module(self.bench.module, self.weights)
        if in_eval:
            self.bench.module.eval()

    def loss(self, part: object) -> Tensor | None:
        """Of the batch, or a part of it."""
        return loss_of(self.bench.step(part, self.batch_idx, random=self.random))


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
    if not case.bench.has_room(passes=size):
        return tapped
    return _attempt(lambda: _by_slices(case, size)) or tapped


def _attempt(way: Callable[[], Answer | None]) -> Answer | None:
    """A step of the user's that fails when it is run again is an answer: this way does not work."""
    try:
        return way()
    except Exception:  # noqa: BLE001 - whatever a user's step raises; the caller says that there is no answer
        return None


# -- the tap -------------------------------------------------------------------------------------------------------------


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
    tap, pulls = _Tap(size), Pulls(size)
    case.set_out(in_eval=case.in_eval)
    with tap, pulls.following(case.bench.module) if case.in_eval else contextlib.nullcontext():
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


# -- the slices ----------------------------------------------------------------------------------------------------------


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
