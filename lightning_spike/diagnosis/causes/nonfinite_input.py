"""`nonfinite_input`: NaN or Inf already in the batch."""

import math
from typing import ClassVar

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import dataset_fix, drop_samples
from lightning_spike.diagnosis.observations.tells import split_verdict, tell, without_none
from lightning_spike.records import Evidence, Family


class NonfiniteInput(Cause):
    """NaN or Inf already in the batch: preprocessing, augmentation, the files.

    Seen by: the count of non-finite values in the batch at the onset, 0 in healthy batches; a loss that is not finite at once; the lab's
    search for the first non-finite value, which ends at the input.

    Against it: a batch whose values are all finite, or in which NaN is usual (it stands for "missing" and the model knows); an origin inside the model.

    Thresholds: none; the count is exact. One NaN that no healthy batch has is evidence of one to a hundred.

    To do: find the sample and mend the step that made it; keep what is not finite out of the loader.
    """

    id: ClassVar = "nonfinite_input"
    family: ClassVar = Family.DATA
    tested_by: ClassVar = frozenset({"data"})
    title: ClassVar = "NaN or Inf in the batch"
    explains: ClassVar = frozenset(
        {"bad_batch", "numerical_instability", "gradient_explosion", "lr_too_high", "warmup_too_short"}
    )

    @override
    def examine(self, case: Case) -> Examination:
        worst = _leaf(case)
        told = case.lab("nonfinite_origin")
        phase = told.get("phase") if told is not None else None
        evidence = without_none(
            _count(case, worst),
            _origin(case),
            _loss_at_once(case) if worst is not None else None,
            split_verdict(case, {"data": SLIGHT if worst is not None else 0.0, "weights": -FAIR}),
        )
        confirmed = None if phase is None else phase == "input"
        return Examination(
            evidence=evidence,
            summary=_summary(case, worst),
            fixes=_fixes(case, worst),
            change=drop_samples(case),
            confirmed=confirmed,
        )


def _leaf(case: Case) -> tuple[str, float] | None:
    """The leaf with the most non-finite values in the batch at the onset, of those that are usually without."""
    counts = [(leaf, count) for leaf in case.leaves("nonfinite") if (count := _unusual(case, leaf)) is not None]
    return max(counts, key=lambda c: c[1], default=None)


def _batch(case: Case) -> int:
    """The first batch in question that holds a value that is not finite; the onset where none does."""
    signals = [f"batch/{leaf}/nonfinite" for leaf in case.leaves("nonfinite")]
    return next((at for at in case.questioned if any((case.at(s, at) or 0.0) > 0.0 for s in signals)), case.onset)


def _unusual(case: Case, leaf: str) -> float | None:
    signal = f"batch/{leaf}/nonfinite"
    count = case.at(signal, _batch(case))
    if count is None or not count > 0.0:
        return None
    usual = case.before(signal, 64)
    return count if not (usual > 0.0).any() else None


def _count(case: Case, worst: tuple[str, float] | None) -> Evidence | None:
    if worst is not None:
        leaf, count = worst
        text = f"'{leaf}' in the batch at step {case.step_of(_batch(case))} holds {_times(count)} NaN or Inf; healthy batches hold none."
        observed = count if math.isfinite(count) else None
        return tell(f"batch/{leaf}/nonfinite", text, DECISIVE + FAIR, step=case.step, observed=observed, expected=0.0)
    counts = [case.at_onset(f"batch/{leaf}/nonfinite") for leaf in case.leaves("nonfinite")]
    if not any(count is not None for count in counts):
        return _finite_loss(case)
    text = f"All values of the batch at step {case.step} are finite, or as often not as usual."
    return tell("batch", text, -DECISIVE, step=case.step, observed=0.0, expected=0.0)


def _finite_loss(case: Case) -> Evidence | None:
    """Where a batch has no values that could be counted (tokens), a finite loss is no sign of any that are not finite."""
    loss = case.at_onset(case.episode.signal)
    if loss is None or not math.isfinite(loss):
        return None
    return tell(case.episode.signal, f"The loss at step {case.step} is finite.", -STRONG, step=case.step, observed=loss)


def _times(count: float) -> str:
    return f"{count:.0f} times" if math.isfinite(count) else "some"


def _origin(case: Case) -> Evidence | None:
    told = case.lab("nonfinite_origin")
    if told is None or not isinstance(told.get("phase"), str):
        return None
    inside = told["phase"] == "input"
    text = told.get("text")
    words = (
        text if isinstance(text, str) and text else f"Replayed, the first non-finite value appears in: {told['phase']}."
    )
    return tell("lab/nonfinite_origin", words, DECISIVE if inside else -DECISIVE, step=case.step)


def _loss_at_once(case: Case) -> Evidence | None:
    loss = case.at(case.episode.signal, _batch(case))
    if loss is None:
        return None
    if math.isfinite(loss):
        return tell(
            case.episode.signal,
            "The loss of that batch is finite all the same.",
            -STRONG,
            step=case.step,
            observed=loss,
        )
    return tell(case.episode.signal, "The loss of that very batch is not finite.", SLIGHT, step=case.step)


def _summary(case: Case, worst: tuple[str, float] | None) -> str:
    if worst is None:
        return f"NaN or Inf came in with the batch at step {case.step}, and {case.loss_text}."
    return f"'{worst[0]}' in the batch at step {case.step_of(_batch(case))} holds {_times(worst[1])} NaN or Inf, and {case.loss_text}."


def _fixes(case: Case, worst: tuple[str, float] | None) -> tuple[str, ...]:
    leaf = worst[0] if worst is not None else "input"
    return (
        dataset_fix(case),
        (
            f"In the dataset's __getitem__, after the last transform, refuse or replace what is not finite in '{leaf}': "
            "torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0), and count how often."
        ),
        f"Go back to a checkpoint from before step {case.step}: weights that took in NaN do not recover.",
    )
