"""The examination of one episode: run it again, then ask it one question after the other, each answered by an experiment."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
from torch import Tensor

from lightning_spike.actions.batch_ring import RingEntry
from lightning_spike.actions.state_copy import load_module
from lightning_spike.lab.allowance import Allowance
from lightning_spike.lab.blame import blame, blame_steps
from lightning_spike.lab.budget import FULL_STEPS
from lightning_spike.lab.calm import MOST as MOST_CALM
from lightning_spike.lab.calm import Calmed, calmed
from lightning_spike.lab.consistency import CHRONIC, Consistency, consistency
from lightning_spike.lab.data import about_the_order, about_the_samples
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.evaluate import log_scale, losses_under
from lightning_spike.lab.few import few_that_tell
from lightning_spike.lab.findings import blame_finding, finding
from lightning_spike.lab.intervene import Attribution, attribute, normal_around
from lightning_spike.lab.isolation import Bench, isolated
from lightning_spike.lab.locate import damage_on_the_way
from lightning_spike.lab.measure.measure import measure, measure_single_samples
from lightning_spike.lab.modes import modes_findings
from lightning_spike.lab.nonfinite import Origin, nonfinite_origin
from lightning_spike.lab.order import GONE
from lightning_spike.lab.outside import came_from_outside, outside_findings
from lightning_spike.lab.remedies import Remedy, try_remedies
from lightning_spike.lab.reproduce import Reproduction, go_on, reproduce
from lightning_spike.lab.scene import Scene
from lightning_spike.lab.split import SUBSTANTIAL, Split, batch_noise, split
from lightning_spike.lab.state import TrainState
from lightning_spike.lab.wording import (
    calm_text,
    consistency_text,
    factors_text,
    remedies_text,
)
from lightning_spike.records import EpisodeKind, Finding

__all__ = ["examine", "triage"]

WORTH: Final = 0.25
"""Share of the jump from which the batch is looked into …"""
WORTH_WEIGHTS: Final = 0.1
"""… and the weights: a second fault may hide behind a batch that stands out far more."""
DOUBT: Final = 0.25
"""Probability of steps that are too long all the time from which a batch that stands out gets a second look, under calmed weights."""
ENTWINED: Final = 0.5
"""Share of the jump that the batch makes by itself up to which its neighbours are asked about before the updates."""
WHOSE: Final = "which update did the damage, and what about it"
_ONE_UPDATE: Final = {"updates": 3, "passes": 24}
"""What it takes at least to find the update, and to make it again without either of two things, and without both."""
HALF: Final = 0.5
"""Share of the rise of ordinary batches that the snapshot's own batch must show for what is computed to have changed."""
RATE_JUMP: Final = 2.0
"""Times the rate of the update before from which the updates are asked about before the order of a streak (as in `detectors.learning_rate`)."""
TRIAGE_CONTROLS: Final = 2
"""Ordinary batches in a triage: five forward passes in all."""


def examine(scene: Scene) -> list[Finding]:
    """Examine one episode in full; leaves no trace in the training. Blocks.

    The questions are asked in the order of their worth: the way from the snapshot, batch against weights, and whose the damage is always; then whether steps are too long all along, what
    was measured, the samples, their order, and at last what would have helped. What no longer fits into 40 training steps' worth of time (`lab.allowance`) is not asked, and the `cost` says so.

    Returns:
        Findings of the detector "lab": `nonfinite_origin` where a NaN or Inf could be traced, `split`, and as far as it goes
        `consistency`, `calm`, `factors`, `remedies`, `measured`, `outside` and `blame`; last the `cost` in runs of `training_step`, with what was left out.

    Raises:
        CannotReplay: It cannot be examined; the message says why.
        Exception: Whatever the module's own code raises when it is run again. The training is untouched all the same.
    """
    with isolated(scene.trainer, scene.module, with_optimizers=True, ranks=scene.ranks) as bench:
        bench.allowance = Allowance(FULL_STEPS)
        again, why = _reproduced(scene, bench, None)
        findings = _examined(scene, bench, again, why)
        other = scene.elsewhere() if _is_noise(findings) else None
        if other is not None:
            second = _examined(other, bench, *_reproduced(other, bench, again))
            findings = findings if _is_noise(second) else second
        findings.append(finding(scene, "cost", _cost(scene, bench)))
    return findings


def _cost(scene: Scene, bench: Bench) -> dict[str, Any]:
    counted = {"steps": bench.steps, "updates": bench.updates, "way": len(scene.stretch) - 1, "worth": bench.cost}
    left_out = bench.allowance.left_out
    return counted | ({"left_out": [*left_out], "text": bench.allowance.text} if left_out else {})


def _examined(scene: Scene, bench: Bench, again: Reproduction | None, why: str | None) -> list[Finding]:
    """About one batch of the episode."""
    if again is not None and again.differs_at is not None:
        if modes := modes_findings(scene, again, bench):
            return modes
        if came_from_outside(scene, again):
            return outside_findings(scene, again, bench)
        why = f"the re-run differs from the training from ordinal {again.differs_at} on"
        again = None
    findings = _origins(scene, bench, again)
    parts = _split(scene, bench, again)
    findings.append(finding(scene, "split", parts.detail() | {"exact": again is not None, "why_not_exact": why}))
    if parts.verdict == "computation":
        findings += _measured(scene, bench, again, parts, None) if again is not None else []
        findings.append(blame_finding(scene, blame(parts, None, None, None)))
    elif again is not None and again.reached == scene.struck:
        findings += _whose(scene, bench, again, parts)
    return findings


def _is_noise(findings: Sequence[Finding]) -> bool:
    """The batch that was looked at is an ordinary one: the jump, if there is one, is elsewhere."""
    return any(told.kind == "split" and told.detail["verdict"] == "noise" for told in findings)


def triage(scene: Scene) -> list[Finding]:
    """The first question only, with few batches and without going back: is the batch high for healthy weights too? Costs some three training steps (`python benchmarks/lab.py`, the column triage).

    Returns:
        A `split` that is not exact.

    Raises:
        CannotReplay: As `examine`, and other exceptions too.
    """
    few = dataclasses.replace(scene, controls=min(scene.controls, TRIAGE_CONTROLS))
    with isolated(scene.trainer, scene.module, ranks=scene.ranks) as bench:
        parts = _split(few, bench, None)
    why = "only a triage was made, for want of budget"
    return [finding(scene, "split", parts.detail() | {"exact": False, "why_not_exact": why})]


# -- does it come back ---------------------------------------------------------------------------------------------------


def _reproduced(scene: Scene, bench: Bench, known: Reproduction | None) -> tuple[Reproduction | None, str | None]:
    """The run from the snapshot to the onset, as far as it is not known already; `None` and the reason where that cannot be had."""
    bench.rewind()
    try:
        with bench.ranks.stage():
            way = scene.stretch, scene.settings, scene.losses
            further = None if known is None else go_on(bench, known, *way)
            return further or reproduce(bench, TrainState.of(scene.snapshot), *way), None
    except CannotReplay as reason:
        return None, str(reason)


# -- where NaN is born ---------------------------------------------------------------------------------------------------


def _origins(scene: Scene, bench: Bench, again: Reproduction | None) -> list[Finding]:
    if scene.episode.kind is not EpisodeKind.NONFINITE and math.isfinite(scene.recorded):
        return []
    reached = scene.struck if again is None else again.reached
    entry = next((e for e in scene.entries if e.at.ordinal == reached), scene.spike)
    old = _origin(bench, scene.snapshot.model, entry)
    new = old if again is None else _origin(bench, again.weights, entry)
    origin = new or old
    if origin is None:
        return []
    healthy = old is not None
    text = origin.text if healthy else f"{origin.text} With weights from before, the same batch passes."
    detail = {"phase": origin.phase, "module": origin.module, "operation": origin.operation, "text": text}
    return [finding(scene, "nonfinite_origin", detail | {"with_healthy_weights": healthy})]


def _origin(bench: Bench, weights: Mapping[str, Tensor], entry: RingEntry) -> Origin | None:
    bench.rewind()
    load_module(bench.module, weights)
    return nonfinite_origin(bench, entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at)


# -- batch or weights, and then whose -----------------------------------------------------------------------------------


def _split(scene: Scene, bench: Bench, again: Reproduction | None) -> Split:
    parts = _parts(scene, bench, again, scene.losses)
    if parts.computation < SUBSTANTIAL or not _computes_as_before(scene, bench, parts):
        return parts
    return _parts(scene, bench, again, {scene.struck: scene.recorded})


def _parts(scene: Scene, bench: Bench, again: Reproduction | None, losses: Mapping[int, float]) -> Split:
    return split(
        bench,
        scene.spike,
        scene.ordinary(),
        old=scene.snapshot.model,
        new=again.weights if again is not None and again.reached == scene.struck else None,
        losses=losses,
        scatter=batch_noise(scene.losses_before()),
    )


def _computes_as_before(scene: Scene, bench: Bench, parts: Split) -> bool:
    """Whether the snapshot's own batch has the loss that it had with just these weights: other batches met other ones, and steps that throw weights about make them differ."""
    first = scene.stretch[0]
    recorded = scene.losses.get(first.at.ordinal, math.nan)
    if first.at.ordinal == scene.struck or not math.isfinite(recorded):
        return False
    values = np.array([recorded, *losses_under(bench, scene.snapshot.model, [first], like=scene.spike, held=True)])
    before, now = log_scale(values)(values)
    return bool(now - before < HALF * parts.computation * parts.jump)


def _whose(scene: Scene, bench: Bench, again: Reproduction, parts: Split) -> list[Finding]:
    """What the batch's part, and the weights', are made of; as far as each is worth it."""
    if parts.verdict == "noise":
        steps = consistency(bench, again.legs, again.end)
        chronic = steps is not None and steps.agitated >= CHRONIC
        return [*_told(scene, steps, None), blame_finding(scene, blame_steps())] if chronic else []
    # A streak of batches none of which is bad by itself: their order explains more than the updates do.
    entwined = parts.data < ENTWINED and not _rate_jumped(scene, again)
    order = about_the_order(scene, bench, again, parts) if entwined else []
    explained = any(told.detail["left"] <= GONE for told in order)
    asks_damage = parts.weights_part >= WORTH_WEIGHTS and not explained
    if asks_damage and order:
        asks_damage = bench.affords(WHOSE, **_ONE_UPDATE)
    damage, helped = _damage(scene, bench, again) if asks_damage else (None, None)
    steps = (
        consistency(bench, again.legs, again.end, but=None if damage is None else damage.ordinal)
        if _asks(parts, damage)
        else None
    )
    doubtful = parts.batch_part >= WORTH and (steps is None or steps.agitated >= DOUBT)
    asked = doubtful and _affords_calm(bench, again)
    calm = calmed(bench, again.legs, scene.spike, scene.ordinary(), excess=parts.excess) if asked else None
    findings = _told(scene, steps, calm)
    if damage is not None:
        findings.append(finding(scene, "factors", dataclasses.asdict(damage) | {"text": factors_text(damage)}))
    measured = _measured(scene, bench, again, parts, None if damage is None else damage.ordinal)
    findings += measured
    findings += about_the_samples(scene, bench, again, parts)
    findings += order if entwined else about_the_order(scene, bench, again, parts)
    if parts.batch_part >= WORTH:
        findings += [finding(scene, "measured", detail) for detail in measure_single_samples(scene, bench)]
    if helped is not None and (remedies := helped()):
        detail = {"tried": [dataclasses.asdict(remedy) for remedy in remedies], "text": remedies_text(remedies)}
        findings.append(finding(scene, "remedies", detail))
    doubt = steps.agitated if doubtful and not asked and steps is not None else 0.0
    turned = any(told.detail.get("direction") == "turned" for told in measured)
    return [*findings, blame_finding(scene, blame(parts, steps, calm, damage, doubt=doubt, turned=turned))]


def _asks(parts: Split, damage: Attribution | None) -> bool:
    """Whether it matters if steps are too long all the time: not where the batch has no part, and the learning rate explains the damage of the located update."""
    if damage is None or parts.batch_part >= WORTH:
        return True
    return sum(share.share for share in damage.shares if share.group == "learning_rate") < 1.0 - WORTH


def _part_of_state(damage: Attribution) -> float:
    return sum(share.share for share in damage.shares if share.group == "optimizer")


def _measured(scene: Scene, bench: Bench, again: Reproduction, parts: Split, located: int | None) -> list[Finding]:
    told = measure(scene, bench, again, located=located, blames_weights=parts.weights_part >= WORTH)
    return [finding(scene, "measured", detail) for detail in told]


def _told(scene: Scene, steps: Consistency | None, calm: Calmed | None) -> list[Finding]:
    findings: list[Finding] = []
    if steps is not None:
        detail = dataclasses.asdict(steps) | {"agitated": steps.agitated, "text": consistency_text(steps)}
        findings.append(finding(scene, "consistency", detail))
    if calm is not None:
        detail = dataclasses.asdict(calm) | {"left": calm.left, "text": calm_text(calm)}
        findings.append(finding(scene, "calm", detail))
    return findings


def _rate_jumped(scene: Scene, again: Reproduction) -> bool:
    """Whether one of the kept updates had a rate far above that of the update before it: then the updates are asked about first."""
    kept = {leg.update.ordinal for leg in again.legs}
    first = [
        (k, float(steps[0][0].get("lr", 0.0))) for k, steps in sorted(scene.settings.items()) if steps and steps[0]
    ]
    return any(k in kept and rate > RATE_JUMP * before > 0.0 for (_, before), (k, rate) in pairwise(first))


def _affords_calm(bench: Bench, again: Reproduction) -> bool:
    updates = sum(len(leg.update.entries) for leg in again.legs)
    return bench.affords("the batch under calmed weights", updates=updates, passes=1 + MOST_CALM)


def _damage(
    scene: Scene, bench: Bench, again: Reproduction
) -> tuple[Attribution | None, Callable[[], tuple[Remedy, ...]] | None]:
    """The factors of the update that did the damage, and how to ask what would have helped; nothing where no update did any."""
    controls = _few(scene, bench, again)
    found = damage_on_the_way(bench, again, controls, like=scene.spike)
    if found is None or found.log_rise <= 0:
        return None, None
    around = normal_around(scene, again, found.first, controls)
    legs, scatter = again.legs[found.first : found.last + 1], batch_noise(scene.losses_before())
    shared = attribute(bench, found, legs, around, controls, like=scene.spike, scatter=scatter)
    state = shared.intrinsic + _part_of_state(shared) >= WORTH
    ask = partial(try_remedies, bench, found, legs, around, controls, like=scene.spike, empties_state=state)
    return shared, ask


def _few(scene: Scene, bench: Bench, again: Reproduction) -> Sequence[RingEntry]:
    """The ordinary batches that damage is measured on; what they are chosen by was evaluated for the split."""
    controls = scene.ordinary()
    old, new = (
        losses_under(bench, w, controls, like=scene.spike, held=True) for w in (scene.snapshot.model, again.weights)
    )
    scale = log_scale(old, new)
    return few_that_tell(controls, scale(new) - scale(old))
