"""`hardware_fault`: the same inputs give another result: a transient error of the machine, a flipped bit.

Seen by: the replay, which with the same batches, learning rates and random states does not have the jump, while no
write was seen. Of the tensors compared: single weights that changed by a power of two (one bit of the exponent or the
sign), or weights that were the same up to the very batch whose loss differs.

Against it: a jump that the replay has too; a write into weights or state that was seen; whole tensors that differ,
which is the work of code.

Thresholds: the replay agrees to the bit on the CPU and to rounding elsewhere until the fault. A write through `.data`
moves no version counter and can look the same; in single elements it is rarer.

To do: run the same stretch on this device and on another; check the device's error counters; go back to a checkpoint
from before.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import NEAR
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.outside import WHOLE_TENSOR_SHARE, changed_weights, earlier, last_write
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import OutsideChange
from lightning_spike.records import Change, Family

FLIPPED_SHARE: Final = 0.75
"""Share of the changed elements that must differ by a power of two: by chance one in two hundred does;
engineering choice."""
GIANT_WEIGHT: Final = 1e18
"""Weight that training cannot make from a usual one: about the root of the largest float32. A flip of the top bit of
the exponent makes a weight 1e38 times as large; engineering choice."""
USUAL_WEIGHT: Final = 1e6
"""Largest weight up to which the weights before were usual; engineering choice."""
BUGS: Final = ("not_zeroed", "not_optimized", "settings_changed")
"""Findings about other faults of the training step."""


@observer("repaired", "partly repaired", "reproduced", "unknown", signal="lab/replay")
def reproduction(view: EpisodeView) -> Observation | None:
    """Whether the replay has the jump as well."""
    change = view.experiments.outside_change
    if change is not None:
        is_whole = change.repaired is not None and change.repaired >= judgement.CONFIRMING_SHARE
        level, confirms = "repaired" if is_whole else "partly repaired", True if _is_by_machine(view, change) else None
        text, signal = sentences.outside_change(change), "lab/outside_change"
        return Observation(text, level=level, signal=signal, observed=change.repaired, confirms=confirms)
    if view.shares or view.split not in {None, SplitVerdict.NOT_REPRODUCED}:
        text = "The replay gives the same result: the machine made no error."
        return Observation(text, level="reproduced", confirms=False)
    return Observation("Nothing shows that the same inputs would give another result.", level="unknown")


@observer(
    "result", "flipped bits", "single elements", "whole tensors", "state or gradient", signal="lab/outside_change"
)
def what_changed(view: EpisodeView) -> Observation | None:
    """What differs: a result, single weights, whole tensors, or something else than weights."""
    change = view.experiments.outside_change
    level = None if change is None else _change_level(change)
    if change is None or level is None:
        return None
    elements, of, powers = changed_weights(change)
    text = f"{elements} of {of} weights of these tensors differ, {powers} of them by a power of two or in sign alone."
    text = text if of else sentences.outside_change(change)
    return Observation(text, level=level, observed=float(elements), expected=0.0)


def _change_level(change: OutsideChange) -> str | None:
    if change.kind == "result":
        return "result"
    if change.kind in {"optimizer", "gradient", "momentum_or_gradient"}:
        return "state or gradient"
    elements, of, powers = changed_weights(change)
    if change.kind != "weights" or not of:
        return None
    if powers >= FLIPPED_SHARE * max(elements, 1) and elements <= 2 * WHOLE_TENSOR_SHARE * of:
        return "flipped bits"
    return "single elements" if elements <= WHOLE_TENSOR_SHARE * of else "whole tensors"


@observer("seen", "other bug", "none", signal="outside_writes")
def writes(view: EpisodeView) -> Observation | None:
    """Writes seen near the onset, by the version counters of all ranks, and other faults of the training step."""
    change = view.experiments.outside_change
    if change is None:
        return None
    if _written(view, change):
        return Observation("Code outside the training step was seen writing just before.", level="seen")
    if any(earlier(view, "optimizer", kind) is not None for kind in BUGS):
        return Observation("The training step is known to have another fault.", level="other bug", signal="optimizer")
    return Observation("Torch's version counters show no write into weights or optimizer state.", level="none")


@observer("giant", signal="weight_max")
def giant_weight(view: EpisodeView) -> Observation | None:
    """A weight that grew by twelve powers of ten within ten batches, as training never makes it."""
    rows = [row for row in view.store.layers.get("weight_max", ()) if row.at.ordinal <= view.onset + 2 * NEAR]
    before = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal < view.onset - 1]
    after = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal >= view.onset - 1]
    if not before or not after or before[-1].shape != after[0].shape or not before[-1].size:
        return None
    jumped = (after[0] > GIANT_WEIGHT) & np.isfinite(after[0]) & (before[-1] < USUAL_WEIGHT)
    if not jumped.any():
        return None
    largest, usual = float(after[0][jumped].max()), float(before[-1][jumped].max())
    text = f"A weight is {largest:.3g}; before, its tensor had at most {usual:.3g}. One flipped bit does that."
    return Observation(text, observed=largest, expected=usual)


def _written(view: EpisodeView, change: OutsideChange) -> bool:
    near = [found[0] for what in ("weights", "optimizer_state") if (found := last_write(view, what)) is not None]
    return bool(change.writes) or any(view.onset - finding.at.ordinal <= NEAR for finding in near)


def _is_by_machine(view: EpisodeView, change: OutsideChange) -> bool:
    """Whether no write was seen, and no whole tensor, state or gradient differs."""
    by_code = _change_level(change) in {"whole tensors", "state or gradient"} or change.kind == "modes"
    return not by_code and not _written(view, change)


def _summary(view: EpisodeView) -> str:
    change = view.experiments.outside_change
    what = "the same inputs did not give the same result"
    if change is not None and change.kind == "result":
        what = "a forward pass gave another result with the same weights and batch"
    elif change is not None and change.kind == "weights":
        what = f"{changed_weights(change)[0]} weights changed without a write"
    return f"At step {view.step} {what}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    if view.experiments.outside_change is None:
        return ()
    counters = "`nvidia-smi -q -d ECC`, Xid messages and memory errors in the system log"
    test = (
        f"Run the stretch around step {view.step} on this device and on another; if they differ, take the device out. "
        f"Look at its error counters ({counters}); on a CPU run a memory test."
    )
    return (
        Fix(test, Change(setting="hardware", value="device")),
        Fix(f"Go back to a checkpoint from before step {max(view.step - 1, 0)}: damaged weights stay wrong."),
        Fix("If nothing is found, look for code that writes through `.data` or NumPy views: version counters miss it."),
    )


CAUSE: Final = Cause(
    id="hardware_fault",
    family=Family.ENVIRONMENT,
    title="An error of the machine",
    meaning="the same inputs give different results: a transient error, a flipped bit",
    observations=(reproduction, what_changed, writes, giant_weight),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset(
        {"weight_blowup", "warmup_too_short", "stale_second_moment", "momentum_reversal", "activation_saturation"}
    ),
)
