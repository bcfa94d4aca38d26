"""`adam_epsilon_too_small`: v_t near zero and eps smaller still, so that noise is turned into full-size updates."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, Excess
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, GUARD, REACH, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.settings import SettingChange, changed_setting, setting_evidence
from lightning_spike.diagnosis.observations.tells import batch_value, lone_batch, split_verdict, tell, without_none
from lightning_spike.records import Change, EpisodeKind, Evidence, Family

USUAL: Final = 1e-8
"""Adam's own epsilon in every library."""
ADVISED: Final = (1e-6, 1e-5)
"""What to use instead (mission.md's table of remedies: 1e-6 … 1e-5), the second where gradients have shown to be noise."""
FAR_BELOW: Final = 0.01
"""Factor on epsilon from which it was lowered, and not merely tuned."""
TINY: Final = 1e-12
"""An epsilon so small stops nothing in float32: the square of a gradient of that size is near the smallest that single precision holds with all digits (1e-38 for 1e-19)."""
HUGE: Final = 10.0
"""RMS of g / max(sqrt(v), eps), where 2.3 is bad (Wortsman et al. 2023), from which second moments have no hold on the update at all."""
FADED: Final = 0.1
"""Factor on the usual gradient norm from which it has faded, so that what is left may be noise."""
SHARE: Final = 0.5
"""Share of the damage that the lab's experiment must give to epsilon, as elsewhere to confirm a cause."""


class AdamEpsilonTooSmall(Cause):
    """Second moments near zero and an epsilon smaller still: noise is turned into full-size updates, or 0 / 0 into NaN.

    Seen by: an epsilon that was changed to (nearly) nothing just before (finding `settings_changed`), or has been so all along; gradients far below their usual size
    while the update is as large as ever; updates that are not finite while gradients and batch are; the lab's experiment that gives the damage to epsilon.

    Against it: an optimizer that has no epsilon; one of 1e-8 or more with gradients of their usual size.

    Thresholds: libraries use 1e-8; a hundredth of what it was is no tuning; below 1e-12 it holds back nothing in float32. Whether v is small against epsilon does not tell by itself: 1e-8 is
    far below v in any healthy run.

    To do: eps 1e-6, or 1e-5 where gradients are that small; in half precision 1e-8 is 0.
    """

    id: ClassVar = "adam_epsilon_too_small"
    family: ClassVar = Family.OPTIMIZER
    title: ClassVar = "Adam's epsilon is too small"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset(
        {"numerical_instability", "lr_too_high", "gradient_explosion", "stale_second_moment"}
    )
    standing: ClassVar = frozenset({("optimizer", "settings_changed")})

    @override
    def examine(self, case: Case) -> Examination:
        eps = case.setting("eps")
        if eps is None:
            none = tell("eps", "The optimizer has no epsilon.", -DECISIVE)
            return Examination(evidence=(none,) if case.facts.optimizers else ())
        lowered = changed_setting(case, _lowered, "eps")
        now = eps if lowered is None else lowered.after
        evidence = without_none(
            setting_evidence(case, lowered) if lowered is not None else _value(eps),
            _not_finite(case, now),
            _full_size(case, now),
            _experiment(case, lowered),
            lone_batch(case, -FAIR),
            batch_value(case, ordinary=0.0, odd=-FAIR) if lowered is None else None,
            split_verdict(case, {"data": -STRONG, "noise": -FAIR}),
        )
        value = ADVISED[1] if now > 0.0 and _faded(case) is not None else ADVISED[0]
        return Examination(
            evidence=evidence,
            summary=_summary(case, now, lowered),
            fixes=_fixes(value, now, lowered),
            change=Change(setting="eps", value=value),
        )


def _lowered(change: SettingChange) -> bool:
    return change.after < min(FAR_BELOW * change.before, USUAL)


def _value(eps: float) -> Evidence:
    if eps <= 0.0:
        return tell("eps", "There is no epsilon: it is 0.", STRONG, observed=eps, expected=USUAL)
    if eps <= TINY:
        text = f"Epsilon is {eps:.3g}, which holds nothing back in float32."
        return tell("eps", text, FAIR, observed=eps, expected=USUAL)
    text = f"Epsilon is {eps:.3g}, and was not changed while training ran."
    return tell("eps", text, -STRONG if eps >= USUAL else -SLIGHT, observed=eps, expected=USUAL)


def _not_finite(case: Case, eps: float) -> Evidence | None:
    """NaN out of finite gradients and a finite batch: 0 / 0 in the update."""
    if case.kind is not EpisodeKind.NONFINITE or not eps < USUAL:
        return None
    gradient = case.latest("grad_norm", case.onset - 1)
    if gradient is None or not math.isfinite(gradient[1]) or case.onset - gradient[0] > GUARD:
        return None
    text = f"The gradients of the update before were finite (norm {gradient[1]:.3g}), the loss after it was not."
    return tell("grad_norm", text, FAIR, step=case.step, observed=gradient[1])


def _full_size(case: Case, eps: float) -> Evidence | None:
    """Gradients far below their usual size that make an update as large as any."""
    rms = case.latest("update_rms", case.onset)
    faded = _faded(case)
    if rms is None or case.onset - rms[0] > REACH or not eps < USUAL or faded is None:
        return None
    if not rms[1] >= HUGE and math.isfinite(rms[1]):
        return None
    text = f"The gradient norm was {faded.observed:.3g} (usually {faded.expected:.3g}), and yet up to {rms[1]:.3g} times what the second moments and epsilon expect."
    observed = rms[1] if math.isfinite(rms[1]) else None
    return tell("update_rms", text, FAIR, step=case.step, observed=observed, expected=1.0)


def _faded(case: Case) -> Excess | None:
    found = [e for at in range(case.onset - GUARD, case.onset) if (e := case.excess("grad_norm", at)) is not None]
    low = [e for e in found if 0.0 <= e.observed < FADED * e.expected]
    return min(low, key=lambda e: e.observed, default=None)


def _experiment(case: Case, lowered: SettingChange | None) -> Evidence | None:
    """The lab's answer. Its re-run may not carry a setting that was changed: then what it calls a change from outside is this."""
    shares, factors = case.blame, case.lab("factors") or {}
    finer = [s for key in ("finer", "shares") for s in factors.get(key) or () if isinstance(s, dict)]
    of_eps = [s for s in finer if s.get("factor") == "epsilon"]
    text = str((case.lab("blame") or {}).get("text") or "The moment was run again.")
    if of_eps:
        share = float(of_eps[0].get("share") or 0.0)
        return tell("lab/factors", text, DECISIVE if share >= SHARE else 0.0, step=case.step, observed=share)
    if not shares or lowered is not None:
        return None
    share = shares.get("optimizer", 0.0)
    return tell("lab/blame", text, 0.0 if share >= SHARE else -STRONG, step=case.step, observed=share)


def _summary(case: Case, eps: float, lowered: SettingChange | None) -> str:
    then = f", and {case.loss_text}" if case.store.episodes else ""
    if lowered is not None:
        return f"{lowered.text}, so that noise makes updates of full size and 0 / 0 is NaN{then}."
    return f"Adam's epsilon of {eps:.3g} holds nothing back{then}."


def _fixes(value: float, eps: float, lowered: SettingChange | None) -> tuple[str, ...]:
    use = f"Use eps={value:g} in place of {eps:.3g}: large enough to hold back updates made of noise, far below the roots of healthy second moments."
    who = (
        f"Find what set eps to {lowered.after:.3g} at step {lowered.step}: a cast of the settings to half precision makes 1e-8 a 0."
        if lowered is not None
        else "Keep epsilon and second moments in float32: in half precision 1e-8 is 0."
    )
    return use, who
