"""What speaks for trouble that lies in the model's own layers, and against it: steps, batches and writes that may have brought it about."""

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.constants import FAIR, NEAR, STRONG
from lightning_spike.diagnosis.observations.measured import steps_too_long
from lightning_spike.diagnosis.observations.rates import JUMPS, SCHEDULED, climbed, rate_event
from lightning_spike.diagnosis.observations.step_length import wild_start
from lightning_spike.diagnosis.observations.tells import (
    batch_value,
    early_gradient,
    gradient_all_but_gone,
    jump_without_cause_in_update,
    lone_batch,
    tell,
    without_none,
)
from lightning_spike.records import Evidence

WRITES = ("weights", "optimizer_state")


def from_elsewhere(case: Case) -> tuple[Evidence, ...]:
    """Whether something upstream has damaged the layers: an event of the rate, gradients that exploded, long updates, an odd batch, writes by others, a setting that was changed, a slow growth of the loss.

    A jump of the loss after ordinary updates with an ordinary batch speaks for the layers themselves.
    """
    return without_none(
        rate_to_blame(case, event=-STRONG, climb=-STRONG),
        _gradient(case),
        _update(case) or _start(case) or _steps(case),
        _written(case),
        _setting(case),
        batch_value(case, ordinary=0.0, odd=-STRONG),
        lone_batch(case, -STRONG),
        jump_without_cause_in_update(case, sign=1.0, most=FAIR) or _gradual(case),
    )


def rate_to_blame(case: Case, *, event: float, climb: float) -> Evidence | None:
    """That a learning rate which came back up, jumped or has climbed may have brought it about; the weights of an event and of a climb."""
    moved = rate_event(case, SCHEDULED + JUMPS)
    if moved is not None:
        return tell(moved.signal, f"It may come of the learning rate: {moved.text}.", event, step=moved.step)
    rose = climbed(case)
    if rose is None:
        return None
    text = f"It may come of the learning rate: {rose.text}."
    return tell(rose.signal, text, climb, step=case.step, observed=rose.now, expected=rose.usual)


def _gradient(case: Case) -> Evidence | None:
    lead = early_gradient(case)
    if lead is None:
        return None
    text = f"The gradient norm was {lead.ratio:.3g} times its usual {lead.expected:.3g} before; a step like that leaves damage of any kind."
    return tell("grad_norm", text, -STRONG, step=case.step, expected=lead.expected)


def _update(case: Case) -> Evidence | None:
    size = case.worst("update_norm", case.onset - 2 * NEAR, case.onset - 1)
    if size is None or not size.above:
        return None
    return tell(
        "update_norm",
        f"An update before was {size.ratio:.3g} times as long as usual.",
        -FAIR,
        step=case.step,
        expected=size.expected,
    )


def _start(case: Case) -> Evidence | None:
    wild = wild_start(case.store)
    if wild is None or wild.after.ordinal > case.onset:
        return None
    return tell("update_norm", f"{wild.text} Steps like that leave damage of any kind.", -STRONG, step=wild.after.step)


def _steps(case: Case) -> Evidence | None:
    found = steps_too_long(case)
    if found is None:
        return None
    text = f"By experiment steps are too long: {found.detail.get('text')}"
    return tell("lab/steps", text, -STRONG, step=found.at.step)


def _written(case: Case) -> Evidence | None:
    found = case.findings("outside_writes", *WRITES, first=case.onset - 2 * NEAR, last=case.onset)
    if not found:
        return None
    return tell(
        "outside_writes", "Somebody wrote into weights or optimizer state just before.", -STRONG, step=found[-1].at.step
    )


def _setting(case: Case) -> Evidence | None:
    """A momentum, decay or epsilon that was changed while training ran does damage of its own."""
    found = case.findings("optimizer", "settings_changed", first=0, last=case.last)
    if not found:
        return None
    text = f"It may come of a setting of the optimizer: {found[-1].detail.get('text')}"
    return tell("optimizer/settings", text, -STRONG, step=found[-1].at.step)


def _gradual(case: Case) -> Evidence | None:
    if case.sudden is not False or gradient_all_but_gone(case, 0.0) is not None:
        return None
    return tell(
        case.episode.signal,
        "The loss rose over several batches, as by steps that do damage bit by bit.",
        -FAIR,
        step=case.step,
    )
