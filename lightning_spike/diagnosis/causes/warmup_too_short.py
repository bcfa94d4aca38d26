"""`warmup_too_short`: the early spike of a warm-up that is missing or ends too soon."""

import math
from typing import ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, NEAR, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import clip_fix, longest_bearable, warmup_steps
from lightning_spike.diagnosis.observations.quiet import Shown
from lightning_spike.diagnosis.observations.rates import JUMPS, SCHEDULED, borne_later, rate_event
from lightning_spike.diagnosis.observations.step_length import (
    goes_on_falling,
    long_steps,
    passed_early_peak,
    wild_start,
)
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    jump_without_cause_in_update,
    lone_batch,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, Evidence, Family
from lightning_spike.store import TrainerStateStore

EARLY: Final = 64
"""Updates that are early in any run."""
EARLY_SHARE: Final = 0.1
"""… and this share of the run so far."""
MOST_OF_PEAK: Final = 0.5
"""Share of its later peak at which the rate counts as up (science.md 2.1: LR above 50 % of the peak within 2 / (1 - beta2) steps)."""
AFTER_PEAK: Final = 32
"""Updates after the end of a warm-up that are still its doing."""


class WarmupTooShort(Cause):
    """The early spike of a warm-up that is missing or ends too soon.

    Seen by: an onset in the first updates of the run, with the rate at more than half of its peak from the start, or just come to the end of a short
    ramp; above all by what follows: later the loss is lower than ever under the very same rate, so it is not the rate but its coming too soon.

    Against it: an onset later on (decisive); a rate that is far below its peak; a loss that never came back under that rate (then it is
    too high throughout); an odd batch; a run that was resumed.

    Thresholds: Adam's second moment needs 2 / (1 - beta2) steps to settle (Ma & Yarats), so an onset up to there counts as early, but not past
    64 updates or a tenth of the run.

    To do: let the rate rise over so many updates.
    """

    id: ClassVar = "warmup_too_short"
    family: ClassVar = Family.LEARNING_RATE
    tested_by: ClassVar = frozenset({"learning_rate", "intrinsic"})
    title: ClassVar = "The warm-up is missing or too short"
    explains: ClassVar = frozenset({"gradient_explosion", "numerical_instability"})

    @override
    def shown(self, store: TrainerStateStore) -> Shown | None:
        wild = wild_start(store)
        later = any((f.detector, f.kind) == ("lab", "steps_too_long") for f in store.findings)
        if wild is None or later or long_steps(store) is not None:
            return None
        if goes_on_falling(store):  # it was borne: worth a word only where there is no other trouble
            return None if store.episodes else Shown(at=wild.after)
        return Shown(at=wild.after) if passed_early_peak(store) else None

    @override
    def examine(self, case: Case) -> Examination:
        early = _early(case)
        if early is None or early.weight < 0.0:
            return Examination(evidence=without_none(early))
        signal = max(case.rate_signals, key=lambda s: case.rate(s) or 0.0, default=None)
        if signal is None:
            return Examination()
        ramp = _ramp(case, signal)
        jumped = jump_without_cause_in_update(case, sign=-1.0)
        # That the rate was borne later tells a short warm-up from a rate too high; whether steps did it at all is asked before.
        by_steps = jumped is None or jumped.weight > -FAIR
        evidence = without_none(
            early,
            ramp,
            _wild(case),
            _bearable_later(case, signal) if by_steps else None,
            _event(case),
            jumped,
            lone_batch(case, -STRONG),
            batch_value(case, ordinary=SLIGHT, odd=-STRONG),
            split_verdict(case, {"data": -STRONG, "weights": FAIR, "noise": -FAIR}),
        )
        updates = _updates(case)
        return Examination(
            evidence=evidence,
            summary=f"{updates} updates into the run {signal} was at {case.rate(signal) or math.nan:.3g} already, and {case.loss_text}.",
            fixes=_fixes(case, signal),
            change=_change(case, signal),
            confirmed=False if case.split == "data" else None,
        )


def _updates(case: Case) -> int:
    return case.step - case.facts.first_step


def _early(case: Case) -> Evidence | None:
    run = case.store.history.ordinals.size
    settled = 2.0 / (1.0 - case.beta2) if case.beta2 is not None and case.beta2 < 1.0 else math.inf
    limit = min(settled, max(EARLY, EARLY_SHARE * run / max(case.facts.accumulate_grad_batches, 1)))
    if case.facts.first_step > 0:
        return tell(
            "lr", "The run was resumed: its first updates are not those of an untrained model.", -STRONG, step=case.step
        )
    updates = _updates(case)
    if updates > limit:
        return tell("lr", f"It began {updates} updates into the run, long after its start.", -DECISIVE, step=case.step)
    return tell(
        "lr",
        f"It began {updates} updates into the run.",
        SLIGHT,
        step=case.step,
        observed=float(updates),
        expected=None,
    )


def _wild(case: Case) -> Evidence | None:
    """Whether the first updates threw the initial weights away: what a warm-up is there to prevent."""
    wild = wild_start(case.store)
    if wild is None or wild.after.ordinal > case.onset + NEAR:
        return None
    if goes_on_falling(case.store):
        text, weight = f"{wild.text} Later the loss went on falling.", STRONG
    elif passed_early_peak(case.store):
        text, weight = f"{wild.text} It was at the peak that the rate came to early, and soon came down from.", FAIR
    else:
        return None
    return tell("update_norm", text, weight, step=wild.after.step, observed=wild.share)


def _ramp(case: Case, signal: str) -> Evidence | None:
    """Whether the rate was up from the start, had just come up, or was still low."""
    rates = case.store.history.before(signal, case.onset, case.onset)
    rate, peak = case.rate(signal), _peak(case, signal)
    if rates.size == 0 or rate is None or not peak > 0.0:
        return None
    if rate < MOST_OF_PEAK * peak:
        text = f"{signal} was {rate:.3g}, far below its later peak of {peak:.3g}."
        return tell(signal, text, -FAIR, step=case.step, observed=rate, expected=peak)
    up = int(np.argmax(rates >= MOST_OF_PEAK * peak))
    if passed_early_peak(case.store) and rates.size - up <= AFTER_PEAK:
        text = f"A warm-up took {signal} from {rates[0]:.3g} to its peak of {peak:.3g} in the first updates, and soon after it was down to half of that."
        return tell(signal, text, STRONG, step=case.step, observed=rate, expected=peak)
    if up <= NEAR:
        text = f"There is no warm-up: {signal} was {rates[0]:.3g} from the first update on."
        return tell(signal, text, FAIR, step=case.step, observed=float(rates[0]), expected=None)
    since = rates.size - up
    if since > AFTER_PEAK:
        return None
    text = f"The warm-up took {signal} past half of its peak ({peak:.3g}) {since} updates before the loss rose."
    return tell(signal, text, STRONG, step=case.step, observed=rate, expected=peak)


def _peak(case: Case, signal: str) -> float:
    """The highest rate of the first part of the run: a warm-up's end; later peaks are a schedule's own."""
    rates = case.store.history.between(signal, 0, 4 * max(case.onset, EARLY))
    rates = rates[np.isfinite(rates)]
    return float(rates.max()) if rates.size else 0.0


def _bearable_later(case: Case, signal: str) -> Evidence | None:
    """Whether the loss came down later at about the same rate."""
    told = borne_later(case, signal)
    if told is None:
        return None
    text, borne = told
    if not borne and passed_early_peak(case.store):
        return None  # the rate did not stay: that the loss was lost for good says nothing of it
    return tell(signal, text, STRONG if borne else -FAIR, step=case.step, expected=case.episode.loss_before)


def _event(case: Case) -> Evidence | None:
    event = rate_event(case, SCHEDULED + JUMPS)
    if event is None or event.ordinal <= NEAR:
        return None
    return tell(event.signal, f"The schedule has an event of its own there: {event.text}.", -FAIR, step=event.step)


def _lower(case: Case, signal: str) -> float | None:
    """The peak to use, where updates at the present one would be longer than a warm-up can make good."""
    most = longest_bearable(case, signal)
    return most if most is not None and most < _peak(case, signal) else None


def _change(case: Case, signal: str) -> Change:
    lower = _lower(case, signal)
    if lower is not None:
        return Change(setting=signal, value=lower)
    return Change(setting="warmup_steps", value=float(warmup_steps(case)[0]))


def _fixes(case: Case, signal: str) -> tuple[str, ...]:
    steps, why = warmup_steps(case)
    lower, peak = _lower(case, signal), _peak(case, signal)
    to = peak if lower is None else lower
    rise = (
        f"Let {signal} rise from {0.01 * to:.2g} to {to:.3g} over the first {steps} updates ({why}): "
        f"torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters={steps}), interval 'step'."
    )
    first = (
        f"Lower the peak of {signal} from {peak:.3g} to {lower:.3g}: beyond, an update like this run's longest would change the weights by more than a tenth of their size."
        if lower is not None
        else None
    )
    return tuple(filter(None, (first, rise, clip_fix(case))))
