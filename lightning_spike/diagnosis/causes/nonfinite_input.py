"""`nonfinite_input`: NaN or Inf already in the batch: preprocessing, augmentation, the files.

Seen by: the count of non-finite values in the batch at the onset, 0 in healthy batches; a loss that is not finite at
once; the lab's search for the first non-finite value, which ends at the input.

Against it: a batch whose values are all finite, or in which NaN is usual (it stands for "missing" and the model handles
it); an origin inside the model.

Thresholds: none; the count is exact. One NaN that no healthy batch has is evidence of more than a hundred to one.

To do: find the sample and correct the step that made it; keep non-finite values out of the loader.
"""

import math
from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import dataset_fix
from lightning_spike.diagnosis.judgement import Group
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.experiments import split_of_jump
from lightning_spike.diagnosis.observations.shared_evidence import finite
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Family

REFERENCE_BATCHES: Final = 64
"""Healthy batches in which a leaf must be free of NaN; engineering choice."""


@observer("only in this batch", "none", "finite loss")
def nonfinite_count(view: EpisodeView) -> Observation | None:
    """The non-finite values in the batch; where values cannot be counted (tokens), whether the loss is finite."""
    worst = view.once(_worst_leaf)
    if worst is not None:
        (leaf, count), step = worst, view.step_of(_batch(view))
        text, signal = f"{_held(leaf, count, step)}; healthy batches hold none.", f"batch/{leaf}/nonfinite"
        return Observation(text, level="only in this batch", signal=signal, observed=finite(count), expected=0.0)
    if all(view.at_onset(f"batch/{leaf}/nonfinite") is None for leaf in view.leaves("nonfinite")):
        return _finite_loss(view)
    text = f"All values of the batch at step {view.step} are finite, or as often non-finite as in healthy batches."
    return Observation(text, level="none", signal="batch", observed=0.0, expected=0.0)


def _finite_loss(view: EpisodeView) -> Observation | None:
    loss = finite(view.at_onset(view.episode.signal))
    if loss is None:
        return None
    return Observation(f"The loss at step {view.step} is finite.", level="finite loss", observed=loss)


@observer("input", "inside the model", signal="lab/first_nonfinite")
def origin(view: EpisodeView) -> Observation | None:
    """Where the lab found the first non-finite value."""
    found = view.experiments.first_nonfinite
    if found is None:
        return None
    in_input = found.phase == "input"
    level = "input" if in_input else "inside the model"
    return Observation(sentences.first_nonfinite(found), level=level, confirms=in_input)


@observer("finite", "non-finite")
def loss_of_batch(view: EpisodeView) -> Observation | None:
    """Whether the loss of that very batch is finite."""
    loss = None if view.once(_worst_leaf) is None else view.at(view.episode.signal, _batch(view))
    if loss is None:
        return None
    level = "finite" if math.isfinite(loss) else "non-finite"
    return Observation(f"The loss of that very batch is {level}.", level=level, observed=finite(loss))


def _worst_leaf(view: EpisodeView) -> tuple[str, float] | None:
    """The leaf with the most non-finite values in the batch, of those that are usually finite."""
    counts = [(leaf, count) for leaf in view.leaves("nonfinite") if (count := _unusual(view, leaf)) is not None]
    return max(counts, key=lambda c: c[1], default=None)


def _batch(view: EpisodeView) -> int:
    """The first suspect batch that holds a non-finite value; the onset where none does."""
    signals = [f"batch/{leaf}/nonfinite" for leaf in view.leaves("nonfinite")]
    holding = (at for at in view.suspect_batches if any((view.at(s, at) or 0.0) > 0.0 for s in signals))
    return next(holding, view.onset)


def _unusual(view: EpisodeView, leaf: str) -> float | None:
    signal = f"batch/{leaf}/nonfinite"
    count = view.at(signal, _batch(view))
    if count is None or not count > 0.0:
        return None
    return None if (view.before(signal, REFERENCE_BATCHES) > 0.0).any() else count


def _held(leaf: str, count: float, step: int) -> str:
    number, plural = f"{count:.0f} " if math.isfinite(count) else "", "" if count == 1 else "s"
    return f"'{leaf}' in the batch at step {step} holds {number}NaN or Inf value{plural}"


def _summary(view: EpisodeView) -> str:
    worst = view.once(_worst_leaf)
    if worst is None:
        return f"NaN or Inf came in with the batch at step {view.step}, and {view.loss_text}."
    return f"{_held(*worst, view.step_of(_batch(view)))}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    worst = view.once(_worst_leaf)
    leaf, repair = "input" if worst is None else worst[0], "torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)"
    where = "In the dataset's __getitem__, after the last transform"
    return (
        dataset_fix(view),
        Fix(f"{where}, reject or overwrite non-finite values in '{leaf}': {repair}, and count how often."),
        Fix(f"Go back to a checkpoint from before step {view.step}: weights that took in NaN do not recover."),
    )


TESTED_BY: Final = frozenset({Group.DATA})

CAUSE: Final = Cause(
    id="nonfinite_input",
    family=Family.DATA,
    title="NaN or Inf in the batch",
    meaning="NaN or Inf already in the batch: preprocessing, augmentation, the files",
    observations=(nonfinite_count, origin, loss_of_batch, split_of_jump(TESTED_BY)),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"bad_batch", "numerical_instability", "lr_too_high", "warmup_too_short"}),
    tested_by=TESTED_BY,
)
