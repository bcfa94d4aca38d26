"""Splits a jump of the loss into batch and weights: both, old and new, against each other."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from torch import Tensor

from lightning_spike.diagnosis.judgement import BELIEVED_ERRORS, SELECTION_ERRORS
from lightning_spike.experiments import Split
from lightning_spike.lab.replay.evaluate import Numbers, log_scale, losses_under
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

MIN_KNOWN_LOSSES: Final = 2
"""Control batches with a recorded loss without which a changed computation is not looked for; engineering choice."""
RISEN_SHARE: Final = 0.75
"""Share of them that must have risen; engineering choice."""
NORMAL_MAD: Final = 1.4826
"""Standard deviation over median absolute deviation of a normal law, by definition."""


def split(
    sandbox: Sandbox,
    spike: RingEntry,
    controls: Sequence[RingEntry],
    *,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor] | None,
    losses: Mapping[int, float],
    scatter: float,
) -> Split:
    """Evaluates old and new weights on the onset's batch and the controls, in train mode with its random state.

    The four means: Y00 controls under old weights, Y01 the batch under old weights, Y10 controls under new weights, Y11
    the batch under new ones. Data is Y01 - Y00, weights Y10 - Y00, interaction the rest of the jump Y11 - Y00.

    What it can tell: whether this batch is high for healthy weights too, and whether these weights are bad for ordinary
    batches too. What it cannot: if the weights are worse, what made them so (that may be an earlier bad batch); and
    controls that were trained on after the old weights look a little too good under the new ones, so a small effect of
    the weights is missed. A batch that only damages the *next* loss is ordinary here.

    Args:
        sandbox: Inside `isolated`; rewound before every evaluation.
        spike: The batch in question.
        controls: Ordinary batches from before it, at least one; better eight.
        old: Healthy weights and buffers from before, as `copy_module` gives them.
        new: Those that the batch's loss was computed with (see `reproduce`). `None` where they are not to be had: then
            its recorded loss stands for Y11, and the present weights, some updates later, for Y10, so that damage shows
            only if it lasts, and counts only for what the batch leaves open.
        losses: What the training recorded, by ordinal; the batch's own among them.
        scatter: Of the log-loss from batch to batch, see `batch_noise`.

    Raises:
        CannotReplay: A step gave no loss.
    """
    recorded = np.array([losses.get(entry.at.ordinal, math.nan) for entry in controls])
    old_losses = losses_under(sandbox, old, [spike, *controls], like=spike, held=True)
    if new is None:
        new_losses = np.array([losses[spike.at.ordinal], *losses_under(sandbox, {}, controls, like=spike)])
    else:
        new_losses = losses_under(sandbox, new, [spike, *controls], like=spike, held=True)
    return split_losses(old_losses, new_losses, scatter=scatter, is_later=new is None, recorded=recorded)


def split_losses(
    old: Numbers, new: Numbers, *, scatter: float, is_later: bool = False, recorded: Numbers | None = None
) -> Split:
    """Turn the losses of the batch and of the controls (in this order) under old and new weights into effects; pure.

    Args:
        old: Under the old weights, shape `(1 + controls,)`.
        new: Under the new ones, same shape.
        scatter: Standard deviation of the log-loss from batch to batch.
        is_later: The new weights on the controls are from after the batch: their damage may be its effect, so it counts
            for no more than the batch leaves open.
        recorded: What the controls had in the training, shape `(controls,)`, NaN where unknown; `None` for no such
            comparison.
    """
    trained = np.full(len(old) - 1, math.nan) if recorded is None else recorded
    scale = log_scale(old, new, trained)
    f_old, f_new = scale(old), scale(new)
    base, differences = float(f_old[1:].mean()), f_new[1:] - f_old[1:]
    known = np.isfinite(trained)
    computation = _computation_effect(f_old[1:][known] - scale(trained)[known], scatter)
    data, weights, jump = float(f_old[0]) - base, float(differences.mean()), float(f_new[0]) - base + computation
    if is_later:
        weights = min(weights, max(jump - computation - data, 0.0))
    count = len(differences)
    scatter = max(scatter, float(f_old[1:].std(ddof=1)) if count > 1 else 0.0)
    return Split(
        jump=jump,
        data_effect=max(0.0, data - SELECTION_ERRORS * scatter),
        weights_effect=weights,
        interaction_effect=jump - computation - data - weights,
        computation_effect=computation,
        weights_error=float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else scatter,
        excess=float(f_new[0] - f_new[1:].mean()),
        noise=scatter * math.sqrt(1 + 1 / count),
        controls=count,
        batch_loss=(float(old[0]), float(new[0])),
        control_loss=(float(np.median(old[1:])), float(np.median(new[1:]))),
        recorded_control_loss=float(np.median(trained[known])) if known.any() else None,
        new_weights_are_later=is_later,
    )


def _computation_effect(rises: Numbers, scatter: float) -> float:
    """Rise of the controls' losses under old weights over the recorded ones; 0 if it may be noise.

    A pair is one batch under nearly the same weights, so the two differ by dropout and by what the training made of the
    batch since, which lowers it. The median, for the computation may give wild values now.
    """
    if len(rises) < MIN_KNOWN_LOSSES:
        return 0.0
    rise = float(np.median(rises))
    is_clear = rise > BELIEVED_ERRORS * scatter / math.sqrt(len(rises)) and float(np.mean(rises > 0.0)) >= RISEN_SHARE
    return rise if is_clear else 0.0


def batch_noise(losses: Numbers) -> float:
    """Standard deviation of the log-loss between batches, robust to spikes and trends; 0 for less than three losses.

    From the median of the magnitudes of successive differences (x 1.4826 / sqrt 2, for normal noise).

    Args:
        losses: Recent losses before the trouble, oldest first.
    """
    values = log_scale(losses)(losses)
    differences = np.diff(values[np.isfinite(values)])
    if len(differences) <= 1:
        return 0.0
    return float(NORMAL_MAD / math.sqrt(2) * np.median(np.abs(differences)))
