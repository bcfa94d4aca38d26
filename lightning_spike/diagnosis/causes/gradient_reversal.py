"""`gradient_reversal`: gradients point up their own loss: a wrong sign, a hook, a loss that is maximised.

Seen by: by experiment, a step down the update's own gradient, however short, raises the loss of its own batch, while
the same step of an earlier update lowered it (slope below 0, science.md 2.3). Where all replayed updates are so, the
loss must have fallen before: no loss falls with such gradients, unless it is meant to rise.

Against it: a slope of about 1, or none measured; a loss that never fell, so that the sign may be intended (an
adversary).

Thresholds: `judgement.TURNED_SLOPE`; float32 rounding makes a hundredth of it.

To do: find the term or hook that turns the gradients; go on from a checkpoint from before, with an empty momentum.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer, premise
from lightning_spike.diagnosis.observations.shared_evidence import batch_values, transient_loss
from lightning_spike.diagnosis.observations.upstream import rate_upstream
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import UpdateMeasurement
from lightning_spike.records import Change, EpisodeKind, Family

COMPARED_LOSSES: Final = 20
"""Losses at the start of the run and before the onset that are compared; engineering choice."""
LOW_QUANTILE: Final = 0.1
"""Quantile of the first losses that the median of the last ones must be below; engineering choice."""


turned_gradient = premise(
    "turned_gradient", lambda view: view.once(_turned_update) is not None, "no slope below 0",
    "No experiment shows a gradient that points up its own loss.", signal="lab/update",
)  # fmt: skip
"""The premise: the experiment shows a gradient that points up its own loss."""


@observer("turned", "turned throughout", signal="lab/update")
def slope(view: EpisodeView) -> Observation | None:
    """The slope of the loss along the update's own gradient."""
    update = view.once(_turned_update)
    if update is None:
        return None
    level, text = judgement.update_direction(update).replace("_", " "), sentences.update(update)
    seen, usual = update.slope, update.slope_usual
    return Observation(text, level=level, step=update.step, observed=seen, expected=usual, confirms=True)


def _turned_update(view: EpisodeView) -> UpdateMeasurement | None:
    update = view.experiments.update
    direction = None if update is None else judgement.update_direction(update)
    is_proven = direction == "turned" or (direction == "turned_throughout" and _loss_had_fallen(view))
    return update if is_proven else None


def _loss_had_fallen(view: EpisodeView) -> bool:
    losses = view.before("loss", len(view.store.history))
    early, late = losses[:COMPARED_LOSSES], losses[-COMPARED_LOSSES:]
    return losses.size >= 2 * COMPARED_LOSSES and float(np.median(late)) < float(np.quantile(early, LOW_QUANTILE))


def _summary(view: EpisodeView) -> str:
    return f"The gradients of the update before step {view.step} point up their own loss, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    update = view.once(_turned_update)
    where = f"the steps just before step {view.step}" if update is None else f"step {update.step}"
    reasons = "a term with the wrong sign (adversarial or reversed), a hook on parameters or modules, a maximised loss"
    return (
        Fix(f"Find what turns the gradients at {where}: {reasons}.", Change(setting="code", value="gradient")),
        Fix(f"Go on from a checkpoint from before {where} with an empty momentum: the present one points up the loss."),
    )


CAUSE: Final = Cause(
    id="gradient_reversal",
    family=Family.GRADIENT,
    title="Gradients that point up the loss",
    meaning="gradients point up their own loss: a wrong sign, a hook, a maximised loss",
    requires=(turned_gradient,),
    observations=(slope, transient_loss, batch_values, rate_upstream),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL},
    explains=frozenset({"gradient_explosion", "lr_too_high", "momentum_reversal"}),
    tested_by=frozenset({Group.GRADIENT}),
)
