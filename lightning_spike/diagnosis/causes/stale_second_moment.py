"""`stale_second_moment`: Adam's v_t lags behind gradients that grew, so the update is far too large."""

import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REACH, REFERENCE, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix
from lightning_spike.diagnosis.observations.outside import earlier
from lightning_spike.diagnosis.observations.rates import steady_rate
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    early_gradient,
    lone_batch,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, Evidence, Family, Finding

STALE: Final = 2.3
"""RMS_t from which spikes follow within 1 to 8 updates (Wortsman et al. 2023)."""
MORE: Final = 2.0
"""Factor over the run's own RMS_t: small nets have 1 to 2 when healthy."""
GREW: Final = 3.0
"""Factor on the gradient norm from which it has grown, as in `gradient_explosion`."""
STRETCH: Final = 40
"""Batches over which growth is measured: four looks of the monitor."""
SHORTER: Final = (0.99, 0.95, 0.9)
"""Second betas to choose from (mission.md: 0.99 or 0.95); the lower, the faster gradients may grow."""
SHARE: Final = 0.5
"""Share of the jump that the lab's experiment must give to the optimizer's state, as elsewhere to confirm a cause."""
NONE: Final = 0.1
"""… up to which it refutes it."""


class StaleSecondMoment(Cause):
    """Adam's second moment lags behind gradients that grew, so that updates are far too large.

    Seen by: RMS_t = sqrt(mean(g² / v)) above 2.3 and above the run's own in the looks before the loss rose, while gradients grew over many batches (finding `second_moment_stale`, told also where the loss
    has borne it); the lab's experiment that gives the damage to the second moments.

    Against it: an optimizer without second moments; RMS_t as usual; a learning rate with an event of its own, or a batch out of range, to blame.

    Thresholds: Wortsman et al. 2023. A single look above 2.3 is common where coordinates had no gradient before, so that one alone says little.

    To do: a lower beta2, short enough to follow the growth that was measured; clip by norm below the grown gradients.
    """

    id: ClassVar = "stale_second_moment"
    family: ClassVar = Family.OPTIMIZER
    title: ClassVar = "A second moment out of date"
    applies_to: ClassVar = LOSS_ROSE
    explains: ClassVar = frozenset({"gradient_explosion", "lr_too_high"})
    standing: ClassVar = frozenset({("optimizer", "second_moment_stale")})

    @override
    def examine(self, case: Case) -> Examination:
        beta2 = case.beta2
        if beta2 is None and "update_rms" not in case.store.history.signals:
            none = tell("beta2", "The optimizer has no second moment.", -DECISIVE)
            return Examination(evidence=(none,) if case.facts.optimizers else ())
        found = earlier(case, "optimizer", "second_moment_stale")
        known = found if found is not None and found.at.ordinal <= case.onset else None
        evidence = without_none(
            _found(case, known) if known is not None else _rms(case),
            _grew(case) if known is None else None,
            _experiment(case),
            _rate(case),
            lone_batch(case, -FAIR),
            batch_value(case, ordinary=0.0, odd=-FAIR),
            split_verdict(case, {"data": -STRONG, "noise": -FAIR}),
        )
        value, why = _beta2(case, known)
        return Examination(
            evidence=evidence,
            summary=_summary(case, known),
            fixes=tuple(filter(None, (f"Use beta2 = {value:g}{'' if beta2 is None else f' in place of {beta2:g}'}: {why}.", clip_fix(case)))),
            change=Change(setting="betas", value=value),
        )  # fmt: skip


def _found(case: Case, found: Finding) -> Evidence:
    text = found.detail.get("text")
    words = text if isinstance(text, str) else "RMS_t was above 2.3 in several looks in a row."
    near = not case.store.episodes or case.onset - found.at.ordinal <= STRETCH
    return tell("update_rms", f"At step {found.at.step}: {words}", DECISIVE if near else FAIR, step=found.at.step)


def _rms(case: Case) -> Evidence | None:
    """The looks just before the onset against the healthy ones."""
    history = case.store.history
    values = history.between("update_rms", case.onset - REACH, case.onset - 1)
    values = values[~np.isnan(values)]
    usual = case.before("update_rms", REFERENCE)
    if values.size == 0 or usual.size == 0:
        return tell("update_rms", "Nothing shows a second moment out of date.", -FAIR, step=case.step)
    high, middle = float(values.max()), float(np.median(usual))
    rare = float(np.mean(usual >= STALE))
    if high < max(STALE, MORE * middle):
        text = f"RMS_t was {high:.3g} before, as a second moment that is up to date has it."
        return tell("update_rms", text, -STRONG, step=case.step, observed=high, expected=middle)
    weight = SLIGHT if rare > 0.05 or not math.isfinite(high) else FAIR  # noqa: PLR2004 - one look in twenty
    text = f"RMS_t was {high:.3g} before, usually {middle:.3g}."
    observed = high if math.isfinite(high) else None
    return tell("update_rms", text, weight, step=case.step, observed=observed, expected=middle)


def _grew(case: Case) -> Evidence | None:
    """Growth over many batches, each a little; without any the second moment has nothing to lag behind."""
    lead = early_gradient(case)
    if lead is None:
        return tell("grad_norm", "The gradients had not grown before.", -FAIR, step=case.step)
    if lead.ratio < GREW or not math.isfinite(lead.ratio):
        return None
    text = f"The gradient norm had grown to {lead.observed:.3g} (usually {lead.expected:.3g})."
    return tell("grad_norm", text, SLIGHT, step=case.step, observed=lead.observed, expected=lead.expected)


def _experiment(case: Case) -> Evidence | None:
    shares = case.blame
    if not shares:
        return None
    share = shares.get("optimizer", 0.0)
    text = str((case.lab("blame") or {}).get("text") or "The moment was run again.")
    if share < SHARE:
        return tell("lab/blame", text, -STRONG if share <= NONE else 0.0, step=case.step, observed=share)
    finer = (case.lab("factors") or {}).get("finer")
    told = [s for s in finer if isinstance(s, dict)] if isinstance(finer, list | tuple) else []
    parts = {str(s.get("factor")): float(s.get("share") or 0.0) for s in told}
    second = parts.get("second_moments", 0.0)
    weight = REPLAYED if second > max(parts.get("momentum", 0.0), 0.0) else -FAIR if parts else SLIGHT
    return tell("lab/blame", text, weight, step=case.step, observed=share)


def _rate(case: Case) -> Evidence | None:
    if not case.rate_signals or steady_rate(case):
        return None
    return tell("lr", "The learning rate had an event just before.", -STRONG, step=case.step)


def _beta2(case: Case, found: Finding | None) -> tuple[float, str]:
    """The longest memory that follows the growth: v lags by less than a factor of two where 1 - beta2 is at least 1 - 1 / s², s the growth in each batch."""
    until = case.onset if found is None else found.at.ordinal
    norms = case.store.history.between("grad_norm", until - STRETCH, until)
    norms = norms[np.isfinite(norms) & (norms > 0.0)]
    beta2 = case.beta2 if case.beta2 is not None else 1.0
    lower = [value for value in SHORTER if value < beta2] or [SHORTER[-1]]
    if norms.size < STRETCH // 2:
        return lower[0], "its memory is shorter, so that it follows gradients that grow"
    slope = float(np.polyfit(np.arange(norms.size), np.log(norms), 1)[0])
    need = math.exp(-2.0 * max(slope, 0.0))
    value = next((v for v in lower if v <= need), lower[-1])
    return (
        value,
        f"the gradients grew by {math.expm1(slope):.1%} in each batch, which a memory of {1.0 / (1.0 - value):.0f} updates follows",
    )


def _summary(case: Case, found: Finding | None) -> str:
    then = f", and {case.loss_text}" if case.store.episodes else ""
    rms = found.detail.get("rms") if found is not None else None
    high = f" (RMS_t {rms:.3g} and more)" if isinstance(rms, float) else ""
    at = case.step if found is None else found.at.step
    return f"By step {at} the gradients had outgrown Adam's second moment{high}, so that updates were too long{then}."
