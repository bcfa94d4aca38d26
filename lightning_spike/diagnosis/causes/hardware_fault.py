"""`hardware_fault`: the same inputs do not give the same result: a transient error of the machine, a flipped bit.

Seen by: the replay, which with the same batches, learning rates and random states does not have the jump; no write was
seen; and of the tensors compared: single weights that are a power of two times their former value (one bit of the
exponent or the sign), or weights that were the same up to the very batch whose loss differs.

Against it: a jump that the replay has too; a write into weights or state that was seen; whole tensors that differ,
which is what code does.

Thresholds: the replay agrees to the bit on the CPU and to rounding elsewhere until something happens. A write through
`.data` moves no version counter and can look the same; it is rarer in
single elements.

To do: run the same stretch on this device and on another; check the device's error counters; go back to a checkpoint
from before.
"""

from typing import Final

import numpy as np

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.constants import NEAR
from lightning_spike.diagnosis.judgement import SplitVerdict
from lightning_spike.diagnosis.observation import Observation, observer
from lightning_spike.diagnosis.observations.outside import changed_weights, earlier, last_write, outside_change
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import OutsideChange
from lightning_spike.records import Change, Family

SINGLE_ELEMENTS_SHARE: Final = 0.25
"""Share of the elements of the tensors concerned up to which single ones were hit; code writes whole tensors;
engineering choice."""
FLIPPED_SHARE: Final = 0.75
"""Share of the changed elements that must differ by a power of two: of numbers changed in any other way one in two
hundred does by chance; engineering choice."""
GIANT_WEIGHT: Final = 1e18
"""A weight that training cannot make from a usual one: sqrt of the largest float32, beyond which a square overflows. A
flip of the top bit of the exponent makes a weight 1e38 times as large; engineering choice."""
USUAL_WEIGHT: Final = 1e6
"""… where the largest weight was below this before."""
BUGS: Final = ("not_zeroed", "not_optimized", "settings_changed")
"""Findings about a training step that is wrong in another way."""


@observer("repaired", "partly repaired", "reproduced", "unknown")
def reproduction(view: EpisodeView) -> Observation | None:
    """Whether the replay has the jump as well."""
    change = outside_change(view)
    if change is not None:
        is_whole = change.repaired is not None and change.repaired >= judgement.CONFIRMING_SHARE
        return Observation(
            level="repaired" if is_whole else "partly repaired", text=sentences.outside_change(change),
            signal="lab/outside_change", step=view.step, observed=change.repaired,
            confirms=True if _is_by_machine(view, change) else None,
        )  # fmt: skip
    if view.shares or view.split not in {None, SplitVerdict.NOT_REPRODUCED}:
        text = "The replay gives the same result: the machine made no error."
        return Observation(level="reproduced", text=text, signal="lab/replay", step=view.step, confirms=False)
    text = "Nothing shows that the same inputs would give another result."
    return Observation(level="unknown", text=text, signal="lab/replay", step=view.step)


@observer("result", "flipped bits", "single elements", "whole tensors", "state or gradient")
def what_changed(view: EpisodeView) -> Observation | None:
    """What differs: a result, single weights, whole tensors, or something else than weights."""
    change = outside_change(view)
    level = None if change is None else _change_level(change)
    if change is None or level is None:
        return None
    elements, of, powers = changed_weights(change)
    text = sentences.outside_change(change)
    if of:
        text = (
            f"{elements} of {of} weights of these tensors differ, {powers} of them by a power of two or in sign alone."
        )
    return Observation(
        level=level, text=text, signal="lab/outside_change", step=view.step, observed=float(elements), expected=0.0
    )


def _change_level(change: OutsideChange) -> str | None:
    if change.kind == "result":
        return "result"
    if change.kind in {"optimizer", "gradient", "momentum_or_gradient"}:
        return "state or gradient"
    elements, of, powers = changed_weights(change)
    if change.kind != "weights" or not of:
        return None
    if powers >= FLIPPED_SHARE * max(elements, 1) and elements <= 2 * SINGLE_ELEMENTS_SHARE * of:
        return "flipped bits"
    return "single elements" if elements <= SINGLE_ELEMENTS_SHARE * of else "whole tensors"


@observer("seen", "other bug", "none")
def writes(view: EpisodeView) -> Observation | None:
    """Writes that were seen near the onset (the lab asks the version counters of all ranks), and other faults of the training step."""
    change = outside_change(view)
    if change is None:
        return None
    if _written(view, change):
        text = "Code outside the training step was seen writing just before."
        return Observation(level="seen", text=text, signal="outside_writes", step=view.step)
    if any(earlier(view, "optimizer", kind) is not None for kind in BUGS):
        text = "The training step is known to have another fault."
        return Observation(level="other bug", text=text, signal="optimizer", step=view.step)
    text = "No write into weights or optimizer state was seen, by torch's version counters."
    return Observation(level="none", text=text, signal="outside_writes", step=view.step)


@observer("giant")
def giant_weight(view: EpisodeView) -> Observation | None:
    """Weights do not grow by twelve powers of ten within ten batches of training."""
    rows = [row for row in view.store.layers.get("weight_max", ()) if row.at.ordinal <= view.onset + 2 * NEAR]
    before = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal < view.onset - 1]
    after = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal >= view.onset - 1]
    if not before or not after or before[-1].shape != after[0].shape or not before[-1].size:
        return None
    jumped = (after[0] > GIANT_WEIGHT) & np.isfinite(after[0]) & (before[-1] < USUAL_WEIGHT)
    if not jumped.any():
        return None
    largest, usual = float(after[0][jumped].max()), float(before[-1][jumped].max())
    text = f"A weight is {largest:.3g}; the largest of its tensor was {usual:.3g} at the look before. One flipped bit does that."
    return Observation(level="giant", text=text, signal="weight_max", step=view.step, observed=largest, expected=usual)


def _written(view: EpisodeView, change: OutsideChange) -> bool:
    near = [found[0] for what in ("weights", "optimizer_state") if (found := last_write(view, what)) is not None]
    return bool(change.writes) or any(view.onset - finding.at.ordinal <= NEAR for finding in near)


def _is_by_machine(view: EpisodeView, change: OutsideChange) -> bool:
    """No write was seen, and what differs is no whole tensor, state or gradient."""
    by_code = _change_level(change) in {"whole tensors", "state or gradient"} or change.kind == "modes"
    return not by_code and not _written(view, change)


def _summary(view: EpisodeView) -> str:
    change = outside_change(view)
    what = "the same inputs do not give the same result"
    if change is not None and change.kind == "result":
        what = "a forward pass gave another result with the same weights and batch"
    elif change is not None and change.kind == "weights":
        what = f"{changed_weights(change)[0]} weights changed without a write"
    return f"At step {view.step} {what}, and {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    if outside_change(view) is None:
        return ()
    return (
        Fix(
            f"Run the stretch around step {view.step} on this device and on another; if they differ, take the device out. "
            "Look at its error counters: `nvidia-smi -q -d ECC`, the system log for Xid messages and for memory errors; "
            "on a CPU run a memory test.",
            Change(setting="hardware", value="device"),
        ),
        Fix(f"Go back to a checkpoint from before step {max(view.step - 1, 0)}: weights that were hit stay wrong."),
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
