"""The examination of one episode: run it again, then ask it one question after the other, each answered by an experiment."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
from torch import Tensor

from lightning_spike.errors import CannotReplay
from lightning_spike.lab.experiments.attribution import Attribution, attribute, recent_baselines
from lightning_spike.lab.experiments.blame import blame, blame_steps
from lightning_spike.lab.experiments.control_sample_size import control_sample_size
from lightning_spike.lab.experiments.cooldown_test import MOST as MOST_CALM
from lightning_spike.lab.experiments.cooldown_test import Cooldown, cooldown_test
from lightning_spike.lab.experiments.damage_location import damage_on_the_way
from lightning_spike.lab.experiments.data_attribution import about_the_order, about_the_samples
from lightning_spike.lab.experiments.findings import blame_finding, finding
from lightning_spike.lab.experiments.first_nonfinite import Origin, nonfinite_origin
from lightning_spike.lab.experiments.mode_change import modes_findings
from lightning_spike.lab.experiments.outside import came_from_outside, outside_findings
from lightning_spike.lab.experiments.remedies import Remedy, try_remedies
from lightning_spike.lab.experiments.sample_order import GONE
from lightning_spike.lab.experiments.split import SUBSTANTIAL, Split, batch_noise, split
from lightning_spike.lab.experiments.step_size import CHRONIC, Consistency, consistency
from lightning_spike.lab.experiments.wording import calm_text, consistency_text, factors_text, remedies_text
from lightning_spike.lab.measure.measure import measure, measure_single_samples
from lightning_spike.lab.replay.evaluate import log_scale, losses_under
from lightning_spike.lab.replay.reproduce import Reproduction, go_on, reproduce
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.records import EpisodeKind, Finding
from lightning_spike.sandbox.budget import FULL_STEPS, Allowance
from lightning_spike.sandbox.isolation import Sandbox, isolated
from lightning_spike.sandbox.state import TrainState

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
    was measured, the samples, their order, and at last what would have helped. What no longer fits into 40 training steps' worth of time (`sandbox.budget`) is not asked, and the `cost` says so.

    Returns:
        Findings of the detector "lab": `nonfinite_origin` where a NaN or Inf could be traced, `split`, and as far as it goes
        `consistency`, `calm`, `factors`, `remedies`, `measured`, `outside` and `blame`; last the `cost` in runs of `training_step`, with what was left out.

    Raises:
        CannotReplay: It cannot be examined; the message says why.
        Exception: Whatever the module's own code raises when it is run again. The training is untouched all the same.
    """
    with isolated(scene.trainer, scene.module, with_optimizers=True, ranks=scene.ranks) as sandbox:
        sandbox.allowance = Allowance(FULL_STEPS)
        replay, why = _reproduced(scene, sandbox, None)
        findings = _examined(scene, sandbox, replay, why)
        other = scene.elsewhere() if _is_noise(findings) else None
        if other is not None:
            second = _examined(other, sandbox, *_reproduced(other, sandbox, replay))
            findings = findings if _is_noise(second) else second
        findings.append(finding(scene, "cost", _cost(scene, sandbox)))
    return findings


def _cost(scene: Scene, sandbox: Sandbox) -> dict[str, Any]:
    counted = {"steps": sandbox.steps, "updates": sandbox.updates, "way": len(scene.stretch) - 1, "worth": sandbox.cost}
    left_out = sandbox.allowance.left_out
    return counted | ({"left_out": [*left_out], "text": sandbox.allowance.text} if left_out else {})


def _examined(scene: Scene, sandbox: Sandbox, replay: Reproduction | None, why: str | None) -> list[Finding]:
    """About one batch of the episode."""
    if replay is not None and replay.differs_at is not None:
        if modes := modes_findings(scene, replay, sandbox):
            return modes
        if came_from_outside(scene, replay):
            return outside_findings(scene, replay, sandbox)
        why = f"the re-run differs from the training from ordinal {replay.differs_at} on"
        replay = None
    findings = _origins(scene, sandbox, replay)
    parts = _split(scene, sandbox, replay)
    findings.append(finding(scene, "split", parts.detail() | {"exact": replay is not None, "why_not_exact": why}))
    if parts.verdict == "computation":
        findings += _measured(scene, sandbox, replay, parts, None) if replay is not None else []
        findings.append(blame_finding(scene, blame(parts, None, None, None)))
    elif replay is not None and replay.reached == scene.target_ordinal:
        findings += _whose(scene, sandbox, replay, parts)
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
    with isolated(scene.trainer, scene.module, ranks=scene.ranks) as sandbox:
        parts = _split(few, sandbox, None)
    why = "only a triage was made, for want of budget"
    return [finding(scene, "split", parts.detail() | {"exact": False, "why_not_exact": why})]


# -- does it come back ---------------------------------------------------------------------------------------------------


def _reproduced(scene: Scene, sandbox: Sandbox, known: Reproduction | None) -> tuple[Reproduction | None, str | None]:
    """The run from the snapshot to the onset, as far as it is not known already; `None` and the reason where that cannot be had."""
    sandbox.rewind()
    try:
        with sandbox.ranks.stage():
            way = scene.stretch, scene.settings, scene.losses
            further = None if known is None else go_on(sandbox, known, *way)
            return further or reproduce(sandbox, TrainState.of(scene.snapshot), *way), None
    except CannotReplay as reason:
        return None, str(reason)


# -- where NaN is born ---------------------------------------------------------------------------------------------------


def _origins(scene: Scene, sandbox: Sandbox, replay: Reproduction | None) -> list[Finding]:
    if scene.episode.kind is not EpisodeKind.NONFINITE and math.isfinite(scene.recorded):
        return []
    reached = scene.target_ordinal if replay is None else replay.reached
    entry = next((e for e in scene.entries if e.at.ordinal == reached), scene.spike)
    old = _origin(sandbox, scene.snapshot.model, entry)
    new = old if replay is None else _origin(sandbox, replay.weights, entry)
    origin = new or old
    if origin is None:
        return []
    healthy = old is not None
    text = origin.text if healthy else f"{origin.text} With weights from before, the same batch passes."
    detail = {"phase": origin.phase, "module": origin.module, "operation": origin.operation, "text": text}
    return [finding(scene, "nonfinite_origin", detail | {"with_healthy_weights": healthy})]


def _origin(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> Origin | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    return nonfinite_origin(sandbox, entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at)


# -- batch or weights, and then whose -----------------------------------------------------------------------------------


def _split(scene: Scene, sandbox: Sandbox, replay: Reproduction | None) -> Split:
    parts = _parts(scene, sandbox, replay, scene.losses)
    if parts.computation < SUBSTANTIAL or not _computes_as_before(scene, sandbox, parts):
        return parts
    return _parts(scene, sandbox, replay, {scene.target_ordinal: scene.recorded})


def _parts(scene: Scene, sandbox: Sandbox, replay: Reproduction | None, losses: Mapping[int, float]) -> Split:
    return split(
        sandbox,
        scene.spike,
        scene.ordinary(),
        old=scene.snapshot.model,
        new=replay.weights if replay is not None and replay.reached == scene.target_ordinal else None,
        losses=losses,
        scatter=batch_noise(scene.losses_before()),
    )


def _computes_as_before(scene: Scene, sandbox: Sandbox, parts: Split) -> bool:
    """Whether the snapshot's own batch has the loss that it had with just these weights: other batches met other ones, and steps that throw weights about make them differ."""
    first = scene.stretch[0]
    recorded = scene.losses.get(first.at.ordinal, math.nan)
    if first.at.ordinal == scene.target_ordinal or not math.isfinite(recorded):
        return False
    values = np.array([recorded, *losses_under(sandbox, scene.snapshot.model, [first], like=scene.spike, held=True)])
    before, now = log_scale(values)(values)
    return bool(now - before < HALF * parts.computation * parts.jump)


def _whose(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split) -> list[Finding]:
    """What the batch's part, and the weights', are made of; as far as each is worth it."""
    if parts.verdict == "noise":
        steps = consistency(sandbox, replay.updates_replayed, replay.end)
        chronic = steps is not None and steps.p_chronic >= CHRONIC
        return [*_told(scene, steps, None), blame_finding(scene, blame_steps())] if chronic else []
    # A streak of batches none of which is bad by itself: their order explains more than the updates do.
    entwined = parts.data < ENTWINED and not _rate_jumped(scene, replay)
    order = about_the_order(scene, sandbox, replay, parts) if entwined else []
    explained = any(told.detail["left"] <= GONE for told in order)
    asks_damage = parts.weights_part >= WORTH_WEIGHTS and not explained
    if asks_damage and order:
        asks_damage = sandbox.affords(WHOSE, **_ONE_UPDATE)
    damage, helped = _damage(scene, sandbox, replay) if asks_damage else (None, None)
    steps = (
        consistency(sandbox, replay.updates_replayed, replay.end, but=None if damage is None else damage.ordinal)
        if _asks(parts, damage)
        else None
    )
    doubtful = parts.batch_part >= WORTH and (steps is None or steps.p_chronic >= DOUBT)
    asked = doubtful and _affords_calm(sandbox, replay)
    calm = (
        cooldown_test(sandbox, replay.updates_replayed, scene.spike, scene.ordinary(), excess=parts.excess)
        if asked
        else None
    )
    findings = _told(scene, steps, calm)
    if damage is not None:
        findings.append(finding(scene, "factors", dataclasses.asdict(damage) | {"text": factors_text(damage)}))
    measured = _measured(scene, sandbox, replay, parts, None if damage is None else damage.ordinal)
    findings += measured
    findings += about_the_samples(scene, sandbox, replay, parts)
    findings += order if entwined else about_the_order(scene, sandbox, replay, parts)
    if parts.batch_part >= WORTH:
        findings += [finding(scene, "measured", detail) for detail in measure_single_samples(scene, sandbox)]
    if helped is not None and (remedies := helped()):
        detail = {"tried": [dataclasses.asdict(remedy) for remedy in remedies], "text": remedies_text(remedies)}
        findings.append(finding(scene, "remedies", detail))
    doubt = steps.p_chronic if doubtful and not asked and steps is not None else 0.0
    turned = any(told.detail.get("direction") == "turned" for told in measured)
    return [*findings, blame_finding(scene, blame(parts, steps, calm, damage, doubt=doubt, turned=turned))]


def _asks(parts: Split, damage: Attribution | None) -> bool:
    """Whether it matters if steps are too long all the time: not where the batch has no part, and the learning rate explains the damage of the located update."""
    if damage is None or parts.batch_part >= WORTH:
        return True
    return sum(share.share for share in damage.shares if share.group == "learning_rate") < 1.0 - WORTH


def _part_of_state(damage: Attribution) -> float:
    return sum(share.share for share in damage.shares if share.group == "optimizer")


def _measured(scene: Scene, sandbox: Sandbox, replay: Reproduction, parts: Split, located: int | None) -> list[Finding]:
    told = measure(scene, sandbox, replay, located=located, blames_weights=parts.weights_part >= WORTH)
    return [finding(scene, "measured", detail) for detail in told]


def _told(scene: Scene, steps: Consistency | None, calm: Cooldown | None) -> list[Finding]:
    findings: list[Finding] = []
    if steps is not None:
        detail = dataclasses.asdict(steps) | {"p_chronic": steps.p_chronic, "text": consistency_text(steps)}
        findings.append(finding(scene, "consistency", detail))
    if calm is not None:
        detail = dataclasses.asdict(calm) | {"left": calm.left, "text": calm_text(calm)}
        findings.append(finding(scene, "calm", detail))
    return findings


def _rate_jumped(scene: Scene, replay: Reproduction) -> bool:
    """Whether one of the kept updates had a rate far above that of the update before it: then the updates are asked about first."""
    kept = {leg.update.ordinal for leg in replay.updates_replayed}
    first = [
        (k, float(steps[0][0].get("lr", 0.0))) for k, steps in sorted(scene.settings.items()) if steps and steps[0]
    ]
    return any(k in kept and rate > RATE_JUMP * before > 0.0 for (_, before), (k, rate) in pairwise(first))


def _affords_calm(sandbox: Sandbox, replay: Reproduction) -> bool:
    updates = sum(len(leg.update.entries) for leg in replay.updates_replayed)
    return sandbox.affords("the batch under calmed weights", updates=updates, passes=1 + MOST_CALM)


def _damage(
    scene: Scene, sandbox: Sandbox, replay: Reproduction
) -> tuple[Attribution | None, Callable[[], tuple[Remedy, ...]] | None]:
    """The factors of the update that did the damage, and how to ask what would have helped; nothing where no update did any."""
    controls = _few(scene, sandbox, replay)
    found = damage_on_the_way(sandbox, replay, controls, like=scene.spike)
    if found is None or found.log_rise <= 0:
        return None, None
    baselines = recent_baselines(scene, replay, found.first, controls)
    updates_replayed, scatter = (
        replay.updates_replayed[found.first : found.last + 1],
        batch_noise(scene.losses_before()),
    )
    shared = attribute(sandbox, found, updates_replayed, baselines, controls, like=scene.spike, scatter=scatter)
    state = shared.intrinsic + _part_of_state(shared) >= WORTH
    ask = partial(
        try_remedies, sandbox, found, updates_replayed, baselines, controls, like=scene.spike, empties_state=state
    )
    return shared, ask


def _few(scene: Scene, sandbox: Sandbox, replay: Reproduction) -> Sequence[RingEntry]:
    """The ordinary batches that damage is measured on; what they are chosen by was evaluated for the split."""
    controls = scene.ordinary()
    old, new = (
        losses_under(sandbox, w, controls, like=scene.spike, held=True) for w in (scene.snapshot.model, replay.weights)
    )
    scale = log_scale(old, new)
    return control_sample_size(controls, scale(new) - scale(old))
