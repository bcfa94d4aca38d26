"""The losses of batches under given weights, all under the same random state, on the scale on which a jump is measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_spike.errors import CannotReplay
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

HIGHEST: Final = 1e6
"""Losses above, and those that are not finite, count as this (science of the 2 x 2: log-loss, clipped)."""

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
    """The logarithm, or nothing at all where one of these losses is negative; what is not finite counts as `HIGHEST`.

    On the logarithm a batch that makes the loss ten times as high and weights that do so add up; on the losses
    themselves the largest would say everything.
    """
    finite = np.concatenate([values[np.isfinite(values)] for values in losses])
    logs = finite.size == 0 or finite.min() > 0

    def scaled(values: Numbers) -> Numbers:
        clipped = np.minimum(np.where(np.isfinite(values), values, HIGHEST), HIGHEST)
        return np.asarray(np.log(clipped) if logs else clipped, dtype=np.float64)

    return scaled


def _known_loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, like: RingEntry) -> float:
    key = (id(weights), id(entry), id(like))
    if key not in sandbox.known:
        sandbox.known[key] = _loss(sandbox, weights, entry, like), (weights, entry, like)
    loss: float = sandbox.known[key][0]
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
