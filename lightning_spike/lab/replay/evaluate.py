"""Evaluates the losses of batches under given weights with one random state, and the scale of a loss jump."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_spike.errors import CannotReplay
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

MAX_LOSS: Final = 1e6
"""Losses above it and non-finite ones count as this; engineering choice."""

Numbers = npt.NDArray[np.float64]


def losses_under(
    sandbox: Sandbox,
    weights: Mapping[str, Tensor],
    entries: Sequence[RingEntry],
    *,
    like: RingEntry,
    held: bool = False,
) -> Numbers:
    """The loss of each batch under these weights, in train mode, each from the same start.

    With several ranks the mean over them, which is the loss of the global batch.

    Common random numbers: dropout masks and augmentation drawn in the step are those of the batch `like`, so that two
    sets of weights are compared on the same thing.

    Args:
        sandbox: Inside `isolated`; rewound before every evaluation.
        weights: Parameters and buffers, as `copy_module` gives them.
        entries: The batches.
        like: Whose random state and place in the run all are given.
        held: The mapping of the weights is kept for as long as the sandbox is, unchanged: a loss that was asked for
            once is remembered. It keeps the mapping alive.

    Returns:
        float64, shape `(len(entries),)`; NaN and Inf are kept.

    Raises:
        CannotReplay: A step gave no loss.
    """
    evaluate = _known_loss if held else _loss
    return sandbox.ranks.mean("losses", [evaluate(sandbox, weights, entry, like) for entry in entries])


def log_scale(*losses: Numbers) -> Callable[[Numbers], Numbers]:
    """The logarithm, or nothing at all where one of these losses is negative; what is not finite counts as `MAX_LOSS`.

    On the logarithm a batch that makes the loss ten times as high and weights that do so add up; on the losses
    themselves the largest would say everything.
    """
    finite = np.concatenate([values[np.isfinite(values)] for values in losses])
    logs = finite.size == 0 or finite.min() > 0

    def scaled(values: Numbers) -> Numbers:
        clipped = np.minimum(np.where(np.isfinite(values), values, MAX_LOSS), MAX_LOSS)
        return np.asarray(np.log(clipped) if logs else clipped, dtype=np.float64)

    return scaled


def _known_loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, like: RingEntry) -> float:
    key = (id(weights), id(entry), id(like))
    if key not in sandbox.cache:
        sandbox.cache[key] = _loss(sandbox, weights, entry, like), (weights, entry, like)
    loss: float = sandbox.cache[key][0]
    return loss


def _loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, like: RingEntry) -> float:
    try:
        outputs = _outputs(sandbox, weights, entry, like, graph=False)
    except RuntimeError:  # a step that differentiates something itself, a gradient penalty say, needs the graph
        outputs = _outputs(sandbox, weights, entry, like, graph=True)
    loss = loss_of(outputs)
    if loss is None:
        msg = f"training_step returned no loss at step {entry.at.step}"
        raise CannotReplay(msg)
    return float(loss.detach())


def _outputs(
    sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, like: RingEntry, *, graph: bool
) -> object:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    return sandbox.step(entry.batch, entry.at.batch_idx, random=like.rng, at=like.at, graph=graph)


T = TypeVar("T")

MAX_RELATIVE_ERROR: Final = 0.1
"""Standard error over the mean rise below which more control batches are not needed; engineering choice."""
MIN_CONTROLS: Final = 2
"""Control batches without which there is no standard error, by definition."""
MAX_DAMAGE_CONTROLS: Final = 4
"""Maximum number of control batches. Four gave the right group for 111 of 111 faults at batch 32
(`python benchmarks/lab.py`)."""


def control_sample_size(controls: Sequence[T], rises: Numbers) -> Sequence[T]:
    """Returns the smallest control set, two to four batches, whose mean loss rise is known to 10 %.

    Args:
        controls: The control batches.
        rises: Loss rise of each, on the scale of `log_scale`; shape `(controls,)`.
    """
    if len(controls) <= MIN_CONTROLS:
        return controls
    mean, scatter = float(rises.mean()), float(rises.std(ddof=1))
    wanted = (scatter / (MAX_RELATIVE_ERROR * mean)) ** 2 if mean > 0 and math.isfinite(mean) else MAX_DAMAGE_CONTROLS
    return controls[: min(max(math.ceil(wanted), MIN_CONTROLS), MAX_DAMAGE_CONTROLS)]
