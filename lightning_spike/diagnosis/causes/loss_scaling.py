"""`loss_scaling`: in mixed precision the loss scale overflows or underflows."""

from collections.abc import Mapping
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, NEAR, REACH, REFERENCE, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.outside import earlier
from lightning_spike.diagnosis.observations.tells import split_verdict, tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

KINDS: Final = ("scale_leapt", "scale_too_low", "often_skipped")
"""Findings of the detector "precision", the most telling first."""
WEIGHTS: Final[Mapping[str, float]] = {"scale_leapt": DECISIVE, "scale_too_low": STRONG, "often_skipped": FAIR}
LOST: Final = 0.5
"""Share of the gradients' entries that are 0 or have lost digits from which they are lost in half precision …"""
MORE: Final = 0.3
"""… if it is so much more than usual: a sparse model has zeros all along."""
START: Final = 65536.0
"""Scale that torch's scaler begins with."""


class LossScaling(Cause):
    """In mixed precision the loss scale is far too large, so that updates are skipped, or far too small, so that gradients underflow.

    Seen by: a scale that moved by more than a scaler moves it; three and more of a hundred updates skipped while the loss was finite; a scale below 1; gradients that are suddenly all 0 in half
    precision; the lab's run in float32, in which the damage is not done.

    Against it: a run without a gradient scaler (float32, bfloat16), where it cannot be; none of the above. Skipped updates while the loss itself is not finite are a symptom.

    Thresholds: one skipped update in 2,000 is usual (science.md 2.4); torch's scaler moves by factors of 2.

    To do: the scale from before as `init_scale`, the scaler's own growth; else bfloat16, which needs none.
    """

    id: ClassVar = "loss_scaling"
    family: ClassVar = Family.ENVIRONMENT
    title: ClassVar = "The loss scale of mixed precision"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    tested_by: ClassVar = frozenset({"numerics"})
    explains: ClassVar = frozenset(
        {"gradient_vanishing", "gradient_explosion", "numerical_instability", "adam_epsilon_too_small", "lr_too_high"}
    )
    standing: ClassVar = frozenset(("precision", kind) for kind in KINDS)

    @override
    def examine(self, case: Case) -> Examination:
        if "loss_scale" not in case.store.history.signals:
            none = tell("loss_scale", f"The run has no loss scale (precision {case.facts.precision}).", -DECISIVE)
            return Examination(evidence=(none,))
        found = [finding for kind in KINDS if (finding := _found(case, kind)) is not None]
        lost = _lost(case)
        evidence = without_none(
            *(_evidence(case, finding) for finding in found),
            lost,
            None if found or lost is not None else _nothing(case),
            split_verdict(case, {"data": -FAIR, "noise": -FAIR}),
        )
        before = _before(case, found)
        return Examination(
            evidence=evidence,
            summary=_summary(case, found),
            fixes=_fixes(case, before),
            change=Change(setting="loss_scale", value=before),
        )


def _found(case: Case, kind: str) -> Finding | None:
    """What was found before the episode; in a run whose loss shows nothing, the first of all."""
    if case.store.episodes:
        return earlier(case, "precision", kind)
    return next((f for f in case.store.findings if (f.detector, f.kind) == ("precision", kind)), None)


def _evidence(case: Case, finding: Finding) -> Evidence:
    text = finding.detail.get("text")
    words = text if isinstance(text, str) else f"The loss scale: {finding.kind}."
    weight, lag = WEIGHTS[finding.kind], case.onset - finding.at.ordinal
    if case.store.episodes:
        if case.kind is EpisodeKind.NONFINITE and finding.kind != "scale_leapt":
            weight = 0.0
        elif lag > 4 * REFERENCE:
            weight = min(weight, SLIGHT)
        elif finding.kind == "scale_leapt":
            weight = DECISIVE + FAIR if lag <= NEAR else DECISIVE if lag <= REACH else STRONG
    observed = next((number(finding.detail[k]) for k in ("after", "scale") if k in finding.detail), None)
    expected = number(finding.detail.get("before"))
    return tell("loss_scale", f"At step {finding.at.step}: {words}", weight, step=finding.at.step, observed=observed, expected=expected)  # fmt: skip


def _lost(case: Case) -> Evidence | None:
    """The newest look at the gradients up to the episode, against the first ones of the run."""
    history = case.store.history
    zeros, below = history.series("grad_zeros"), history.series("grad_underflow")
    until = case.onset if case.store.episodes else int(history.ordinals[-1])
    shares = (zeros + below)[(history.ordinals <= until) & np.isfinite(zeros) & np.isfinite(below)]
    if shares.size < GUARD:
        return None
    usual, now = float(np.median(shares[: shares.size // 2])), float(shares[-1])
    if now < LOST or now < usual + MORE:
        return None
    text = f"{now:.0%} of the gradients' entries are 0 or have lost digits in half precision, usually {usual:.0%}."
    return tell("grad_underflow", text, FAIR, step=case.step, observed=now, expected=usual)


def _nothing(case: Case) -> Evidence:
    return tell("loss_scale", "The loss scale moved as a scaler moves it, and gradients were within its range.", -STRONG, step=case.step)  # fmt: skip


def _before(case: Case, found: list[Finding]) -> float:
    """The scale from before it went wrong: the usual one of the run's updates that were not skipped up to then."""
    first = min((f.at.ordinal for f in found), default=case.onset)
    history = case.store.history
    scale, skipped = history.series("loss_scale"), history.series("skipped_step")
    fine = scale[(history.ordinals < first) & np.isfinite(scale) & (scale >= 1.0) & (skipped == 0.0)]
    return float(np.median(fine)) if fine.size else START


def _summary(case: Case, found: list[Finding]) -> str:
    then = f", and {case.loss_text}" if case.store.episodes else ""
    if not found:
        return f"Gradients left the range of half precision under the loss scale before step {case.step}{then}."
    text = str(found[0].detail.get("text") or f"The loss scale went wrong at step {found[0].at.step}").rstrip(".")
    return f"{text}{then}."


def _fixes(case: Case, before: float) -> tuple[str, ...]:
    first = (
        f"Begin with a loss scale of {before:.5g}, as the run bore it before: MixedPrecision('16-mixed', device, torch.amp.GradScaler(init_scale={before:.5g}, growth_interval=2000)), and look for "
        "what sets or restores another."
    )
    return first, f"Or train in 'bf16-mixed' in place of '{case.facts.precision}', which needs no loss scale."
