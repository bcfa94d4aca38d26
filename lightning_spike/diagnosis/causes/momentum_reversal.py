"""`momentum_reversal`: accumulated momentum points against the present gradient."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, NEAR, REACH, REFERENCE, REPLAYED, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.held import held_gradient
from lightning_spike.diagnosis.observations.measured import all_measured, measured
from lightning_spike.diagnosis.observations.settings import SettingChange, changed_setting, setting_evidence
from lightning_spike.diagnosis.observations.tells import batch_value, lone_batch, split_verdict, tell, without_none
from lightning_spike.diagnosis.observations.upstream import rate_to_blame
from lightning_spike.records import Change, EpisodeKind, Evidence, Family

HIGH: Final = 0.99
"""A momentum from which weights run on for a hundred steps, 1 / (1 - beta); usual are 0.9 and, with large batches, 0.95."""
LONGER: Final = 2.0
"""Factor on the memory 1 / (1 - beta) from which a momentum was raised, and not merely tuned."""
AGAINST: Final = -0.3
"""Cosine between gradient and momentum below which the one points against the other (science.md 2.3)."""
FEW: Final = 8
"""Healthy cosines without which none is called odd."""
RARE: Final = 0.02
"""Quantile of the healthy cosines that one must lie below, to be odd for this run: with momentum near a minimum the cosine is about 0 and scatters."""
SHARE: Final = 0.5
"""Share of the jump that the lab's experiment must give to the state or the momentum, as elsewhere to confirm a cause."""
NONE: Final = 0.1
"""… up to which it refutes it."""
SWING: Final = 64
"""Batches after a momentum was raised in which it shows: it swings up over its memory of a hundred updates and more."""
USUAL: Final = 0.9
"""Momentum of nearly all recipes; what to go back to."""


class MomentumReversal(Cause):
    """Accumulated momentum points against the present gradient, and carries the weights on where the gradient has turned.

    Seen by: a momentum that was changed to nearly 1 just before (finding `settings_changed`); the cosine between momentum and gradient below -0.3 and below nearly all of the run's own,
    just before the loss rose; a step that went up the gradients of the batches before; the lab's experiment that gives the damage to the momentum, for with an empty state it is not done.

    Against it: an optimizer without momentum; a cosine in its range; an experiment that finds the optimizer's state without fault, or one after a gradient that exploded,
    which is then what the state holds.

    Thresholds: science.md 2.3. The cosine is looked at every tenth update, so that a short turn can pass between two looks; that it was not seen weighs little then.

    To do: a lower momentum, or an empty one from before the turn; lower the rate or clip where gradients turn again and again.
    """

    id: ClassVar = "momentum_reversal"
    family: ClassVar = Family.OPTIMIZER
    title: ClassVar = "Momentum against the gradient"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL}
    explains: ClassVar = frozenset({"gradient_explosion", "lr_too_high"})
    standing: ClassVar = frozenset({("optimizer", "settings_changed")})

    @override
    def examine(self, case: Case) -> Examination:
        momentum = _momentum(case)
        if momentum is None:
            none = tell("momentum", "The optimizer has no momentum.", -DECISIVE)
            return Examination(evidence=(none,) if case.facts.optimizers else ())
        raised = changed_setting(case, _raised, "momentum", "betas")
        turned = _turned(case)
        by_gradient = case.blame.get("gradient", 0.0) >= SHARE
        evidence = without_none(
            setting_evidence(case, raised, soon=SWING) if raised is not None else _value(momentum),
            turned if (raised is None and not by_gradient) or (turned is not None and turned.weight > 0.0) else None,
            _direction(case),
            _experiment(case, raised),
            lone_batch(case, -STRONG),
            batch_value(case, ordinary=0.0, odd=-FAIR) if raised is None else None,
            _rate(case, raised),
            split_verdict(case, {"data": -STRONG, "noise": -FAIR, "weights": 0.0 if raised is None else SLIGHT}),
        )
        if by_gradient:
            return Examination(
                evidence=evidence,
                summary=f"The gradients turned round, against the momentum of the updates before: those of the update before step {case.step} point up the loss that they were made from, and {case.loss_text}.",
                fixes=_fixes_of_gradient(case),
                change=Change(setting="code:gradient", value=None),
                confirmed=True,
            )
        now = momentum if raised is None else raised.after
        back = raised.before if raised is not None else min(USUAL, momentum * momentum)
        name = "betas" if case.beta2 is not None else "momentum"
        return Examination(
            evidence=evidence,
            summary=_summary(case, raised, turned),
            fixes=_fixes(name, now, back, raised),
            change=Change(setting="momentum", value=back),
        )


def _momentum(case: Case) -> float | None:
    """The first beta, or SGD's momentum; `None` where there is none."""
    for optimizer in case.facts.optimizers:
        for group in optimizer.groups:
            betas = group.get("betas")
            first = betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
            if isinstance(first, int | float) and 0.0 < first < 1.0:
                return float(first)
    return None


def _raised(change: SettingChange) -> bool:
    """The memory 1 / (1 - beta) is that of a momentum near 1, and clearly longer than it was."""
    return change.after >= HIGH and 1.0 - change.before >= LONGER * (1.0 - change.after)


def _value(momentum: float) -> Evidence | None:
    if momentum < HIGH:
        return None
    text = f"The momentum is {momentum:.4g}: the weights run on for {1.0 / (1.0 - momentum):.0f} updates."
    return tell("momentum", text, FAIR, observed=momentum, expected=USUAL)


def _turned(case: Case) -> Evidence | None:
    """The lowest cosine of the looks just before the onset against those of healthy batches."""
    usual = case.before("momentum_cosine", REFERENCE)
    history = case.store.history
    near = history.between("momentum_cosine", case.onset - REACH, case.onset)
    near = near[np.isfinite(near)]
    if usual.size < FEW or near.size == 0:
        return tell("momentum_cosine", "Nothing shows that the momentum turned.", -FAIR, step=case.step)
    lowest, middle = float(near.min()), float(np.median(usual))
    odd = lowest < AGAINST and lowest < float(np.quantile(usual, RARE))
    text = f"The cosine between momentum and gradient was {lowest:.2g} just before, usually {middle:.2g}."
    return tell("momentum_cosine", text, FAIR if odd else -FAIR, step=case.step, observed=lowest, expected=middle)


def _direction(case: Case) -> Evidence | None:
    """What the lab measured at the update that did the damage: whether its step went where the gradients of the batches before say down, or up."""
    mine = [told for told in all_measured(case) if "direction" in told]
    if not mine:
        return None
    direction, against, text = mine[-1]["direction"], number(mine[-1].get("against")), mine[-1].get("text")
    weight = {"turned": DECISIVE, "wrong_direction": STRONG, "too_long": -FAIR, "ordinary": -SLIGHT}.get(
        str(direction), 0.0
    )
    words = text if isinstance(text, str) else f"The direction of the step was: {direction}."
    return tell("lab/measured", words, weight, step=case.step, observed=against)


def _experiment(case: Case, raised: SettingChange | None) -> Evidence | None:
    """The lab's answer; where the momentum itself was changed it takes that for usual, and finds steps that are too long.

    Gradients that point the other way for a while look to it like steps that are too long all the time, so that the damaging update's own share of the state refutes nothing then; but it shows
    little either, for too high a rate swings momentum up just so.
    """
    shares = case.blame
    if not shares:
        return None
    share = shares.get("optimizer", 0.0) + shares.get("gradient", 0.0)
    text = str((case.lab("factors") or case.lab("blame") or {}).get("text") or "The moment was run again.")
    if raised is None and held_gradient(case) is not None:
        text, weight = f"{text} What the state held was one exploded gradient.", -FAIR
    elif share >= SHARE:
        weight = REPLAYED if shares.get("gradient", 0.0) >= SHARE or _of_momentum(case) else FAIR
    elif _of_state(case) >= SHARE and raised is None:
        weight = SLIGHT
    else:
        steps = shares.get("intrinsic", 0.0) >= SHARE
        weight = (FAIR if steps else 0.0) if raised is not None else 0.0 if share > NONE else -STRONG
    return tell("lab/factors", text, weight, step=case.step, observed=share)


def _of_state(case: Case) -> float:
    """Share of the damage of the located update that is the optimizer's state."""
    shares = _items(case, "shares")
    return sum(max(number(s.get("share")) or 0.0, 0.0) for s in shares if s.get("group") == "optimizer")


def _of_momentum(case: Case) -> bool:
    """Whether the experiment that looked closer found the momentum, and not the second moments."""
    parts = {str(s.get("factor")): number(s.get("share")) or 0.0 for s in _items(case, "finer")}
    return parts.get("momentum", 0.0) > max(parts.get("second_moments", 0.0), 0.0) if parts else case.beta2 is None


def _items(case: Case, key: str) -> list[Mapping[str, Any]]:
    told = (case.lab("factors") or {}).get(key)
    return [item for item in told if isinstance(item, Mapping)] if isinstance(told, list | tuple) else []


def _rate(case: Case, raised: SettingChange | None) -> Evidence | None:
    """A rate that has jumped or climbed swings the momentum up: then it is the rate's doing."""
    return None if raised is not None else rate_to_blame(case, event=-FAIR, climb=-STRONG)


def _summary(case: Case, raised: SettingChange | None, turned: Evidence | None) -> str:
    then = f", and {case.loss_text}" if case.store.episodes else ""
    if raised is not None:
        runs = f"{1.0 / max(1.0 - raised.after, 1e-12):.0f}"
        what = raised.text.replace("betas", "the first beta").replace("momentum of", "the momentum of")
        return f"{what[:1].upper()}{what[1:]}, so that the weights run on for some {runs} updates past where the gradient turns{then}."
    cosine = "" if turned is None or turned.observed is None else f" (cosine {turned.observed:.2g})"
    return f"The momentum pointed against the gradient{cosine} just before step {case.step}{then}."


def _fixes(name: str, now: float, back: float, raised: SettingChange | None) -> tuple[str, ...]:
    setting = f"betas=({back:.3g}, …)" if name == "betas" else f"momentum={back:.3g}"
    use = f"Use {setting} in place of {now:.4g}: the memory is then {1.0 / (1.0 - back):.0f} updates long in place of {1.0 / max(1.0 - now, 1e-12):.0f}."
    if raised is not None:
        return use, f"Find what set it at step {raised.step}, and go on from a checkpoint from before."
    empty = f"Empty the momentum where gradients turn: within {NEAR} batches it is as old as the turn, and only carries the weights on."
    return use, empty


def _fixes_of_gradient(case: Case) -> tuple[str, ...]:
    told = measured(case, "updates") or {}
    at = told.get("step")
    where = f"step {at}" if isinstance(at, int) else f"the steps just before step {case.step}"
    return (
        f"Find what turns the gradients round at {where}: a term with the wrong sign (an adversarial or reversed one), a hook on parameters or modules, a loss that is maximised.",
        f"Go on from a checkpoint from before {where} with an empty momentum, for what it holds points up the loss.",
    )
