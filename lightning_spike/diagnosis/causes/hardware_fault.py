"""`hardware_fault`: the same inputs do not give the same result again."""

from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, NEAR, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.outside import OutsideChange, earlier, last_write, outside_change
from lightning_spike.diagnosis.observations.tells import tell, without_none
from lightning_spike.records import Change, Evidence, Family

MOST: Final = 0.5
"""Share of the jump that must be gone in the re-run for it to be the change's."""
SINGLE: Final = 0.25
"""Share of the elements of the tensors concerned up to which single ones were hit; code writes tensors as wholes."""
FLIPS: Final = 0.75
"""Share of the changed elements that must be a power of two times what they were: of numbers changed in any other way some one in two hundred is so by chance."""
FARTHEST: Final = 1e18
"""A weight that training cannot have made from a usual one: sqrt of the largest float32, beyond which a square overflows. A flip of the top bit of the exponent makes a weight 1e38 times as large."""
USUAL: Final = 1e6
"""… where the largest weight was below this before."""


class HardwareFault(Cause):
    """The same inputs do not give the same result again: a transient error of the machine, a flipped bit.

    Seen by: the replay, which with the same batches, learning rates and random states does not have the jump; nobody was seen writing; and of what it compares: single weights
    that are a power of two times what they were (one bit of the exponent or the sign), or weights that were the same up to the very batch whose loss is another.

    Against it: a jump that the replay has too; somebody who was seen writing into weights or state; tensors that are others as wholes, which is what code does.

    Thresholds: the replay agrees to the bit on the CPU and to rounding elsewhere until something happens. A write through `.data` moves no version counter and can look the same; it is rarer
    in single elements.

    To do: run the same stretch again, on this device and on another; check the device's error counters; go back to a checkpoint from before.
    """

    id: ClassVar = "hardware_fault"
    family: ClassVar = Family.ENVIRONMENT
    title: ClassVar = "An error of the machine"
    explains: ClassVar = frozenset(
        {
            "numerical_instability",
            "weight_blowup",
            "gradient_explosion",
            "lr_too_high",
            "warmup_too_short",
            "stale_second_moment",
            "momentum_reversal",
            "activation_saturation",
        }
    )

    @override
    def examine(self, case: Case) -> Examination:
        change = outside_change(case)
        evidence = without_none(
            _not_again(case, change),
            _what(case, change),
            _nobody(case, change),
            _giant_weight(case),
        )
        if change is None:
            return Examination(evidence=evidence, confirmed=False if case.blame else None)
        return Examination(
            evidence=evidence,
            summary=_summary(case, change),
            fixes=_fixes(case),
            change=Change(setting="hardware", value="device"),
            confirmed=True if not change.seen and sum(item.weight for item in evidence) > 0.0 else None,
        )


def _not_again(case: Case, change: OutsideChange | None) -> Evidence:
    if change is not None:
        again = "" if change.repaired is None else f", {change.repaired:.0%} of the jump are gone"
        text = f"Run again with the same batches, rates and random states, the loss comes out as it should have{again}."
        weight = STRONG if change.repaired is not None and change.repaired >= MOST else FAIR
        return tell("lab/outside", text, weight, step=case.step, observed=change.repaired)
    if case.blame or (case.split is not None and case.split != "not_reproduced"):
        text = "Run again, the moment comes out the same: the machine made no error."
        return tell("lab/split", text, -DECISIVE, step=case.step)
    if case.split == "not_reproduced":
        return tell("lab/split", "Run again, the jump is not there.", SLIGHT, step=case.step)
    return tell("lab/split", "Nothing shows that the same inputs would give another result.", -STRONG, step=case.step)


def _what(case: Case, change: OutsideChange | None) -> Evidence | None:
    """What is another: a result, single weights, whole tensors, or something else than weights."""
    if change is None:
        return None
    if change.changed == "result":
        return tell("lab/outside", change.text, REPLAYED, step=case.step)
    if change.changed in {"optimizer", "gradient", "momentum_or_gradient"}:
        return tell("lab/outside", change.text, -STRONG, step=case.step)
    share = change.share if change.changed == "weights" else None
    if share is None:
        return None
    flips = change.powers_of_two / max(change.elements, 1)
    text = f"Of {change.of} weights of the tensors concerned {change.elements} are others, {change.powers_of_two} of them by a power of two or in sign alone."
    if flips >= FLIPS and share <= 2 * SINGLE:
        return tell("lab/outside", text, DECISIVE, step=case.step, observed=float(change.elements), expected=0.0)
    weight = FAIR if share <= SINGLE else -STRONG
    return tell("lab/outside", text, weight, step=case.step, observed=float(change.elements), expected=0.0)


def _nobody(case: Case, change: OutsideChange | None) -> Evidence | None:
    """The version counters of weights and state, near the onset (the lab asks those of all ranks); and what else of the training step was found to be wrong."""
    if change is None:
        return None
    near = [found for what in ("weights", "optimizer_state") if (found := last_write(case, what)) is not None]
    if change.seen or any(case.onset - finding.at.ordinal <= NEAR for finding, _ in near):
        return tell("outside_writes", "Somebody was seen writing just before.", -DECISIVE, step=case.step)
    bugs = ("not_zeroed", "not_optimized", "settings_changed")
    if any(earlier(case, "optimizer", kind) is not None for kind in bugs):
        return tell("optimizer", "The training step is known not to do what it must.", -FAIR, step=case.step)
    text = "Nobody was seen writing into weights or optimizer state, by torch's version counters."
    return tell("outside_writes", text, FAIR, step=case.step)


def _giant_weight(case: Case) -> Evidence | None:
    """Weights do not grow by twelve powers of ten within ten batches in training."""
    rows = [row for row in case.store.layers.get("weight_max", ()) if row.at.ordinal <= case.onset + 2 * NEAR]
    before = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal < case.onset - 1]
    after = [np.asarray(row.values, dtype=np.float64) for row in rows if row.at.ordinal >= case.onset - 1]
    if not before or not after or before[-1].shape != after[0].shape or not before[-1].size:
        return None
    jumped = (after[0] > FARTHEST) & np.isfinite(after[0]) & (before[-1] < USUAL)
    if not jumped.any():
        return None
    largest, usual = float(after[0][jumped].max()), float(before[-1][jumped].max())
    text = f"A weight is {largest:.3g}; the largest of its tensor was {usual:.3g} at the look before. One flipped bit of the exponent does that."
    return tell("weight_max", text, STRONG, step=case.step, observed=largest, expected=usual)


def _summary(case: Case, change: OutsideChange) -> str:
    what = {
        "result": "a forward pass gave another result with the same weights and batch",
        "weights": f"{change.elements} weights were changed with nobody writing",
    }.get(change.changed or "", "the same inputs do not give the same result again")
    return f"At step {case.step} {what}, and {case.loss_text}."


def _fixes(case: Case) -> tuple[str, ...]:
    step = max(case.step - 1, 0)
    again = (
        f"Run the stretch around step {case.step} again on this device and on another; if it differs, take the device out. Look at its error counters: `nvidia-smi -q -d ECC`, the system "
        "log for Xid messages and for memory errors; on a CPU run a memory test."
    )
    return (
        again,
        f"Go back to a checkpoint from before step {step}: weights that were hit stay wrong.",
        "If nothing is found, look for user code that writes through `.data` or NumPy views: it is not seen by torch's version counters either.",
    )
