"""How much of a jump of the loss is the batch's doing, and how much the weights': both, old and new, against each other."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from torch import Tensor

from lightning_spike.lab.replay.evaluate import Numbers, log_scale, losses_under
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

SELECTION: Final = 2.0
"""Standard deviations of the batches' noise that are taken off the batch's share: it was picked *because* its loss was high (winner's curse)."""
CLEAR: Final = 3.0
"""Standard errors from which an effect is believed, as 3 sigma."""
SUBSTANTIAL: Final = 0.25
"""Share of the jump from which a cause is named at all."""
MOST: Final = 0.5
"""Share of the whole jump from which what is computed has changed, and neither batch nor weights are asked any further."""
FEWEST: Final = 2
"""Ordinary batches with a known loss without which a change of what is computed is not looked for."""
NEARLY_ALL: Final = 0.75
"""Share of them that must have risen."""
ENTWINED: Final = 0.5
"""Share of the interaction in the sum of the magnitudes from which neither batch nor weights can be named alone."""

Verdict = Literal["data", "weights", "both", "noise", "not_reproduced", "computation"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The jump of the loss at a batch, in parts."""

    jump: float
    """From the controls under the old weights to the batch under the new ones: log-ratio of the losses (their difference where they can be negative). Where what is computed has
    changed, from the losses that the controls had in the training."""
    data: float
    """Share of the jump, in [0, 1], that the batch makes under the old weights already, less the selection."""
    weights: float
    """Share of the jump, in [0, 1], by which the control batches too are worse under the new weights."""
    interaction: float
    """What only both together make, as a share of the jump, in [-1, 1]."""
    computation: float
    """Share of the jump, in [0, 1], that is there with ordinary batches under the old weights already: the same numbers go in, and a higher loss comes out than did in the training."""
    excess: float
    """How far the batch is above the controls under the new weights, in the units of the jump."""
    noise: float
    """Standard deviation of the jump if nothing but the batches' ordinary scatter were at work, in its units."""
    verdict: Verdict
    text: str
    """One sentence with the numbers in it."""

    @property
    def batch_part(self) -> float:
        """The batch's part of the jump, half of what only both together make included: its Shapley value."""
        return self.data + self.interaction / 2

    @property
    def weights_part(self) -> float:
        """The weights' part, with the other half."""
        return self.weights + self.interaction / 2

    def detail(self) -> dict[str, Any]:
        """As in a finding."""
        return dataclasses.asdict(self)


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
    """Evaluate old and new weights on the spike's batch and on the controls, all in train mode and with the spike batch's random state.

    The four means: Y00 controls under old weights, Y01 the batch under old weights, Y10 controls under new weights, Y11 the batch under new ones.
    Data is Y01 - Y00, weights Y10 - Y00, interaction the rest of the jump Y11 - Y00.

    What it can tell: whether this batch is high for healthy weights too, and whether these weights are bad for ordinary batches too. What it cannot: if the weights are
    worse, what made them so (that may be an earlier bad batch); and controls that were trained on after the old weights look a little too good under
    the new ones, so a small effect of the weights is missed. A batch that only damages the *next* loss is ordinary here.

    Args:
        sandbox: Inside `isolated`; rewound before every evaluation.
        spike: The batch in question.
        controls: Ordinary batches from before it, at least one; better eight.
        old: Healthy weights and buffers from before, as `copy_module` gives them.
        new: Those that the batch's loss was computed with (see `reproduce`). `None` where they are not to be had: then its recorded loss stands for Y11,
            and the present weights, some updates later, for Y10, so that damage shows only if it lasts, and counts only for what the batch leaves open.
        losses: What the training recorded, by ordinal; the batch's own among them.
        scatter: Of the log-loss from batch to batch, see `batch_noise`.

    Raises:
        CannotReplay: A step gave no loss.
    """
    usual = np.array([losses.get(entry.at.ordinal, math.nan) for entry in controls])
    old_losses = losses_under(sandbox, old, [spike, *controls], like=spike, held=True)
    if new is None:
        new_losses = np.array([losses[spike.at.ordinal], *losses_under(sandbox, {}, controls, like=spike)])
    else:
        new_losses = losses_under(sandbox, new, [spike, *controls], like=spike, held=True)
    return judge(old_losses, new_losses, scatter=scatter, is_later=new is None, usual=usual)


def judge(old: Numbers, new: Numbers, *, scatter: float, is_later: bool = False, usual: Numbers | None = None) -> Split:
    """Turn the losses of the batch and of the controls (in this order) under old and new weights into shares and a verdict; pure.

    Args:
        old: Under the old weights, shape `(1 + controls,)`.
        new: Under the new ones, same shape.
        scatter: Standard deviation of the log-loss from batch to batch.
        is_later: The new weights on the controls are from after the batch: what is wrong with them may be its doing, so they count for no more than
            it leaves open.
        usual: What the controls had in the training, shape `(controls,)`, NaN where it is not known; `None` for no such comparison.
    """
    trained = np.full(len(old) - 1, math.nan) if usual is None else usual
    scale = log_scale(old, new, trained)
    f_old, f_new = scale(old), scale(new)
    base = float(f_old[1:].mean())
    differences = f_new[1:] - f_old[1:]
    known = np.isfinite(trained)
    other = _changed(f_old[1:][known] - scale(trained)[known], scatter)
    data, weights, jump = float(f_old[0]) - base, float(differences.mean()), float(f_new[0]) - base + other
    if is_later:
        weights = min(weights, max(jump - other - data, 0.0))
    count = len(differences)
    scatter = max(scatter, float(f_old[1:].std(ddof=1)) if count > 1 else 0.0)
    noise = scatter * math.sqrt(1 + 1 / count)
    error = float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else scatter
    interaction = jump - other - data - weights
    shrunk = max(0.0, data - SELECTION * scatter)
    verdict = _verdict(jump, shrunk, weights, interaction, noise=noise, error=error)
    shares = [_share(part, jump) for part in (shrunk, weights, other)]
    if shares[2] >= MOST:
        verdict, text = "computation", _changed_text(old[1:], trained)
    else:
        text = _text(old, new, verdict, "those of now" if is_later else "those at the onset")
    together = _share(abs(interaction), abs(jump)) * math.copysign(1, interaction)
    return Split(
        jump=jump,
        data=shares[0],
        weights=shares[1],
        interaction=together,
        computation=shares[2],
        excess=float(f_new[0] - f_new[1:].mean()),
        noise=noise,
        verdict=verdict,
        text=text,
    )


def _changed(rises: Numbers, scatter: float) -> float:
    """By how much ordinary batches under old weights are above the losses that they had in the training, in the units of the jump; 0 where that may be scatter.

    A pair is one batch under nearly the same weights, so the two differ by dropout and by what the training has made of the batch since, which lowers it. The median, for what is computed
    may be wild now.
    """
    if len(rises) < FEWEST:
        return 0.0
    rise = float(np.median(rises))
    clear = rise > CLEAR * scatter / math.sqrt(len(rises)) and float(np.mean(rises > 0.0)) >= NEARLY_ALL
    return rise if clear else 0.0


def _changed_text(controls: Numbers, trained: Numbers) -> str:
    known = trained[np.isfinite(trained)]
    return (
        f"With the weights from before, {len(known)} ordinary batches now have loss {np.median(controls):.3g} and had {np.median(known):.3g} in the training: neither the batch nor the weights "
        "make the jump, but what is computed with them has changed."
    )


def not_reproduced(text: str, *, jump: float = math.nan) -> dict[str, Any]:
    """As the detail of a split, where the jump does not come back in the re-run: it is neither the batch's nor the weights'.

    Args:
        text: What was found.
        jump: The log-ratio of the recorded loss and that of the re-run; `None` in the detail where it is not finite.
    """
    nothing = Split(
        jump=jump, data=0.0, weights=0.0, interaction=0.0, computation=0.0, excess=0.0, noise=0.0, verdict="not_reproduced", text=text
    )  # fmt: skip
    known = {"jump": jump if math.isfinite(jump) else None}
    return nothing.detail() | known | {"exact": True, "why_not_exact": None}


def batch_noise(losses: Numbers) -> float:
    """Standard deviation of the log-loss from batch to batch, robust against spikes and blind to a trend; 0 for fewer than three losses.

    From the median of the magnitudes of successive differences (x 1.4826 / sqrt 2, for normal noise).

    Args:
        losses: Recent losses before the trouble, oldest first.
    """
    values = log_scale(losses)(losses)
    differences = np.diff(values[np.isfinite(values)])
    return 0.0 if len(differences) < 2 else float(1.4826 / math.sqrt(2) * np.median(np.abs(differences)))  # noqa: PLR2004


def _verdict(jump: float, data: float, weights: float, interaction: float, *, noise: float, error: float) -> Verdict:
    by_weights = weights > CLEAR * error and weights > SUBSTANTIAL * jump
    by_data = data > SUBSTANTIAL * jump
    # The weights are judged by pairs, the same batch under both: that tells them from noise where the jump by itself does not.
    if jump <= noise or (jump <= CLEAR * noise and not by_weights):
        return "noise"
    if abs(interaction) > ENTWINED * (abs(data) + abs(weights) + abs(interaction)):
        return "both"
    if by_weights and by_data:
        return "both"
    if by_weights:
        return "weights"
    return "data" if by_data else "both"


def _share(part: float, jump: float) -> float:
    return min(max(part / jump, 0.0), 1.0) if jump > 0 else 0.0


def _text(old: Numbers, new: Numbers, verdict: Verdict, which: str) -> str:
    meanings: Mapping[Verdict, str] = {
        "data": "the batch itself makes the jump",
        "weights": "the weights make the jump, whatever the batch",
        "both": "this batch and these weights make it together",
        "noise": "that is within the scatter of ordinary batches",
        "not_reproduced": "run again, the spike does not come back",
        "computation": "what is computed has changed",
    }
    controls = "control batch" if len(old) == 2 else f"{len(old) - 1} control batches"  # noqa: PLR2004 - the spike's and one more
    return (
        f"With the weights from before, this batch has loss {old[0]:.3g} and the {controls} {np.median(old[1:]):.3g}; it had {new[0]:.3g} "
        f"in the training, and with {which} the {controls} {np.median(new[1:]):.3g}: {meanings[verdict]}."
    )
