"""The few samples of a batch that stand out: which they are, and what is left of the batch's excess without them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from lightning_spike.experiments import SampleExchange
from lightning_spike.lab.replay.evaluate import Numbers, log_scale, losses_under
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.samples.batches import gather_samples, samples_in
from lightning_spike.samples.outliers import MIN_USUAL, discoveries, tail_probabilities
from lightning_spike.samples.per_sample import held_samples_under
from lightning_spike.sandbox.isolation import Sandbox

FALSE_DISCOVERY_RATE: Final = 0.05
"""False discovery rate, as in `samples.suspect_samples`."""
FEW_SAMPLES_SHARE: Final = 0.5
"""Share of the batch up to which they are a few: beyond, the whole batch stands out; engineering choice."""


def name_samples(
    sandbox: Sandbox, weights: dict[str, Tensor], entry: RingEntry, ordinary: Sequence[RingEntry]
) -> tuple[int, ...]:
    """Positions of the samples whose losses are out of what is usual for these weights, in eval mode.

    None where samples cannot be told apart, or half the batch is.

    A pass for the batch, and one for each of the ordinary ones that it takes to have `MIN_USUAL` samples.

    Args:
        sandbox: Inside `isolated`.
        weights: Healthy ones, as `copy_module` gives them.
        entry: The batch.
        ordinary: Batches to compare with.
    """
    usual = np.zeros(0)
    trusting = False
    for other in ordinary:
        if usual.size >= MIN_USUAL:
            break
        found = held_samples_under(sandbox, weights, other)
        if found is None or not found.explains:
            return ()
        trusting = found.how == "tap"
        usual = np.concatenate([usual, found.losses])
    own = held_samples_under(sandbox, weights, entry, trusting=trusting)
    if own is None or usual.size < MIN_USUAL:
        return ()
    return _outlying(own.losses, usual)


def passes_to_name(entry: RingEntry) -> int:
    """Forward and backward passes that `name_samples` takes at most."""
    return 1 + math.ceil(MIN_USUAL / max(samples_in(entry.batch) or 1, 1))


def _outlying(losses: Numbers, usual: Numbers) -> tuple[int, ...]:
    named = np.flatnonzero(discoveries(tail_probabilities(losses, usual), FALSE_DISCOVERY_RATE))
    return tuple(named.tolist()) if named.size <= FEW_SAMPLES_SHARE * losses.size else ()


def with_samples_exchanged(
    entry: RingEntry, positions: Sequence[int], ordinary: Sequence[RingEntry]
) -> RingEntry | None:
    """The batch with samples of a control batch at these positions; `None` if no control batch fits."""
    for other in ordinary:
        size, spare = samples_in(entry.batch), samples_in(other.batch)
        if size is None or not spare:
            continue
        picks = [(1, k % spare) if k in positions else (0, k) for k in range(size)]
        if (batch := gather_samples([entry.batch, other.batch], picks)) is not None:
            return dataclasses.replace(entry, batch=batch)
    return None


def exchange_samples(
    sandbox: Sandbox,
    weights: dict[str, Tensor],
    spike: RingEntry,
    ordinary: Sequence[RingEntry],
    *,
    positions: tuple[int, ...],
    excess: float,
) -> SampleExchange | None:
    """Measures the batch's loss with control samples in place of the named ones, in two passes; `None` if impossible.

    Args:
        sandbox: Inside `isolated`.
        weights: Weights at the onset.
        spike: The onset's batch.
        ordinary: Control batches, of which the first that fits gives the samples.
        positions: Positions of the named samples.
        excess: Excess of the batch's loss over the control batches', see `Split`.
    """
    other = with_samples_exchanged(spike, positions, ordinary)
    size = samples_in(spike.batch)
    if other is None or size is None or not positions or excess <= 0:
        return None
    losses = np.concatenate(
        [losses_under(sandbox, weights, [entry], like=spike, held=entry is spike) for entry in (spike, other)]
    )
    scaled = log_scale(losses)(losses)
    left = min(max(1.0 - float(scaled[0] - scaled[1]) / excess, 0.0), 1.0)
    return SampleExchange(positions=positions, samples=size, loss=float(losses[0]), without=float(losses[1]), left=left)
