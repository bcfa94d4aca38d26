"""`hard_sample_streak`: order sensitivity: hard or one-sided samples in a row, a sorted or unshuffled stretch."""

from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, STRONG
from lightning_spike.diagnosis.observations.batch_parts import class_leaves
from lightning_spike.diagnosis.observations.course import Stretch, course
from lightning_spike.diagnosis.observations.order import one_sided, targets_known
from lightning_spike.diagnosis.observations.tells import batches, tell, without_none
from lightning_spike.records import Change, Evidence, Family

LONG: Final = 6
"""Batches from which it is a stretch that came sorted and no accident of a short reference."""
MIXED: Final = 0.5
"""Share of the jump that is left with the same samples in another order, up to which it was the order …"""
SAME: Final = 0.9
"""… and from which it was not."""


class HardSampleStreak(Cause):
    """Order sensitivity: hard or one-sided samples in a row, a sorted or unshuffled stretch.

    Seen by: several batches in a row whose targets are less mixed than those of any batch of long before: fewer classes, a lower entropy; for targets that are numbers a
    smaller spread within the batch. The samples may all be healthy: what is wrong is their company. The trouble comes during such a stretch or just after
    it, when the net has forgotten the rest.

    Against it: targets as mixed as always; a single such batch.

    Thresholds: the range is that of up to 128 batches that end 48 before the onset. Targets that are neither classes nor numbers cannot be judged.

    To do: shuffle, with a buffer longer than the stretch; where the order is wanted, mix in samples from before.
    """

    id: ClassVar = "hard_sample_streak"
    family: ClassVar = Family.DATA
    title: ClassVar = "One-sided samples in a row"
    explains: ClassVar = frozenset({"bad_batch", "label_noise", "data_drift", "gradient_explosion", "overfitting"})

    @override
    def examine(self, case: Case) -> Examination:
        found = one_sided(case)
        if found is None:
            known = targets_known(case)
            text = (
                "The targets of the batches before and at the onset are as mixed as ever."
                if known
                else "Of the order of samples nothing is known."
            )
            return Examination(evidence=(tell("batch/target", text, -DECISIVE if known else -STRONG, step=case.step),))
        signal, stretch = found
        where = f"from step {case.step_of(stretch.first)} to {case.step_of(stretch.last)}"
        return Examination(
            evidence=without_none(
                _stretch(case, signal, stretch), _run_of_one(case, stretch), _level(case, signal, stretch), _order(case)
            ),
            summary=f"The samples came one-sided in {batches(stretch.count)} {where} ({signal} down to {stretch.furthest:.3g}, usually {stretch.usual:.3g}), and {case.loss_text}.",
            fixes=(
                f"Shuffle: DataLoader(shuffle=True), or for a stream a buffer of more than the {stretch.last - stretch.first + 1} batches that came sorted {where}.",
                "Where files are written class by class, interleave them; in every epoch another order.",
                "Where the order is wanted, mix samples from before into every batch.",
            ),
            change=Change(setting="shuffle", value="all"),
        )


def _stretch(case: Case, signal: str, stretch: Stretch) -> Evidence:
    text = (
        f"In {batches(stretch.count)} from step {case.step_of(stretch.first)} on the targets are less mixed than in any batch of long before "
        f"({signal} down to {stretch.furthest:.3g}, usually {stretch.usual:.3g})."
    )
    weight = DECISIVE if stretch.count >= LONG else STRONG
    return tell(
        signal, text, weight, step=case.step_of(stretch.first), observed=stretch.furthest, expected=stretch.usual
    )


def _run_of_one(case: Case, stretch: Stretch) -> Evidence | None:
    """Samples with the same target one behind the other, longer than ever."""
    for leaf in class_leaves(case, "target"):
        told = course(case, f"batch/{leaf}/longest_run", stretch.first, stretch.last)
        if told is not None and (run := float(told.values.max())) > told.high:
            text = f"Up to {run:.0f} samples in a row have the same target, usually {told.middle:.0f}."
            return tell(told.signal, text, FAIR, step=case.step, observed=run, expected=told.middle)
    return None


def _level(case: Case, signal: str, stretch: Stretch) -> Evidence | None:
    """Numbers that come sorted are all small, then all large."""
    if not signal.endswith("/std"):
        return None
    told = course(case, f"{signal.removesuffix('/std')}/mean", stretch.first, stretch.last + GUARD)
    if told is None or not (told.stretches(above=True) or told.stretches(above=False)):
        return None
    text = f"In the same batches {told.signal} went from {told.values.min():.3g} to {told.values.max():.3g}, long before from {told.low:.3g} to {told.high:.3g}."
    return tell(told.signal, text, STRONG, step=case.step, observed=float(told.values.max()), expected=told.middle)


def _order(case: Case) -> Evidence | None:
    """The lab's answer: what is left of the jump when the samples come in another order."""
    left = number((case.lab("order") or {}).get("left"))
    if left is None:
        return None
    text = f"With the same samples in a mixed order {left:.0%} of the jump is left."
    weight = STRONG if left <= MIXED else -FAIR if left >= SAME else 0.0
    return tell("lab/order", text, weight, step=case.step, observed=left)
