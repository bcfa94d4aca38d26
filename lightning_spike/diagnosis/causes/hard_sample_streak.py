"""`hard_sample_streak`: order sensitivity: hard or one-sided samples in a row, a sorted or unshuffled stretch.

Seen by: several batches in a row whose targets are less mixed than those of any earlier batch: fewer classes, a lower
entropy; for numeric targets a smaller spread within the batch. The samples are healthy; their order is not. The loss
rises during such a stretch or just after it, when the model has forgotten the rest.

Against it: targets as mixed as before; a single such batch.

Thresholds: the range is that of up to 128 batches that end 48 before the onset. Targets that are neither classes nor
numbers cannot be judged.

To do: shuffle, with a buffer longer than the stretch; where the order is wanted, mix in earlier samples.
"""

from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.batch_parts import class_leaves
from lightning_spike.diagnosis.observations.reference_range import reference_range
from lightning_spike.diagnosis.observations.sample_order import one_sided, targets_known
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, Family

LONG_STRETCH_BATCHES: Final = 6
"""Batches from which a stretch came sorted, and is no chance of a short reference; engineering choice."""


@observer("as mixed as before", "unknown", signal="batch/target")
def targets_mixed(view: EpisodeView) -> Observation | None:
    """The premise: a stretch of one-sided batches."""
    if view.once(one_sided) is not None:
        return None
    if not targets_known(view):
        return Observation("The order of samples was not recorded.", level="unknown")
    return Observation("The targets up to the onset are as mixed as before.", level="as mixed as before")


@observer("long", "short")
def one_sided_stretch(view: EpisodeView) -> Observation | None:
    """The stretch of batches with one-sided targets."""
    found = view.once(one_sided)
    if found is None:
        return None
    signal, stretch = found
    step, usual = view.step_of(stretch.first), stretch.usual
    text = (
        f"The targets are less mixed than in any earlier batch in {batches(stretch.count)} from step {step} on "
        f"({signal} down to {stretch.furthest:.3g}, usually {usual:.3g})."
    )
    level = "long" if stretch.count >= LONG_STRETCH_BATCHES else "short"
    return Observation(text, level=level, signal=signal, step=step, observed=stretch.furthest, expected=usual)


@observer("longer than ever")
def run_of_one_target(view: EpisodeView) -> Observation | None:
    """More samples in a row with the same target than ever before."""
    found = view.once(one_sided)
    if found is None:
        return None
    for leaf in class_leaves(view, "target"):
        series = reference_range(view, f"batch/{leaf}/longest_run", found[1].first, found[1].last)
        if series is not None and (run := float(series.values.max())) > series.high:
            text = f"Up to {run:.0f} samples in a row have the same target, usually {series.middle:.0f}."
            return Observation(text, signal=series.signal, observed=run, expected=series.middle)
    return None


@observer("moves")
def target_level(view: EpisodeView) -> Observation | None:
    """Numeric targets that come sorted: first all small, then all large."""
    found = view.once(one_sided)
    if found is None or not found[0].endswith("/std"):
        return None
    signal = f"{found[0].removesuffix('/std')}/mean"
    series = reference_range(view, signal, found[1].first, found[1].last + GUARD)
    if series is None or not (series.stretches(above=True) or series.stretches(above=False)):
        return None
    low, high = float(series.values.min()), float(series.values.max())
    usual = f"before, from {series.low:.3g} to {series.high:.3g}"
    text = f"In the same batches {signal} ran from {low:.3g} to {high:.3g}; {usual}."
    return Observation(text, signal=signal, observed=high, expected=series.middle)


@observer("order", "same in any order", "undecided", signal="lab/sample_order")
def reshuffled(view: EpisodeView) -> Observation | None:
    """The excess loss that is left when the samples are reshuffled."""
    found = view.experiments.sample_order
    if found is None:
        return None
    level, confirms = judgement.order_level(found), judgement.order_confirms(found)
    return Observation(sentences.sample_order(found), level=level, observed=found.left, confirms=confirms)


def _where(view: EpisodeView) -> str:
    found = view.once(one_sided)
    return "" if found is None else f"from step {view.step_of(found[1].first)} to {view.step_of(found[1].last)}"


def _summary(view: EpisodeView) -> str:
    found = view.once(one_sided)
    if found is None:
        return f"The samples came one-sided, and {view.loss_text}."
    signal, stretch = found
    values = f"{signal} down to {stretch.furthest:.3g}, usually {stretch.usual:.3g}"
    return f"The samples came one-sided in {batches(stretch.count)} {_where(view)} ({values}), and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    found = view.once(one_sided)
    length = 0 if found is None else found[1].last - found[1].first + 1
    buffer = f"for a stream a buffer of more than the {length} batches that came sorted {_where(view)}"
    return (
        Fix(f"Shuffle: DataLoader(shuffle=True), or {buffer}.", Change(setting="shuffle", value="all")),
        Fix("Where files are written class by class, interleave them; use another order in every epoch."),
        Fix("Where the order is wanted, mix earlier samples into every batch."),
    )


CAUSE: Final = Cause(
    id="hard_sample_streak",
    family=Family.DATA,
    title="One-sided samples in a row",
    meaning="hard or one-sided samples in a row, a sorted or unshuffled stretch",
    requires=(targets_mixed,),
    observations=(one_sided_stretch, run_of_one_target, target_level, reshuffled),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"bad_batch", "label_noise", "data_drift", "overfitting"}),
)
