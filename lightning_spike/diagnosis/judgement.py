"""Judges experiments: every threshold, every share, and the meaning of "confirmed".

The lab only measures (`lightning_spike.experiments`); this module alone decides what the numbers mean. Pure; uses
neither torch nor Lightning.

A cause is **confirmed** where replay gives at least half of the jump to its groups (a repair fraction of one half,
science.md 3.3), or where an experiment on this very cause confirms it. It is **refuted** where the share is at most a
tenth, or where such an experiment refutes it. Otherwise no experiment decides.
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from lightning_spike.experiments import (
    Attribution,
    Experiments,
    FirstNonFinite,
    ModeMeasurement,
    ModuleActivity,
    ModuleChange,
    ModuleMeasurement,
    OutsideChange,
    SampleOrder,
    Split,
    StepSize,
    UpdateMeasurement,
)


class Group(StrEnum):
    """What a share of the jump is due to."""

    DATA = "data"
    LEARNING_RATE = "learning_rate"
    OPTIMIZER = "optimizer"
    CLIPPING = "clipping"
    NUMERICS = "numerics"
    GRADIENT = "gradient"
    """A gradient that points up its own loss."""
    INTRINSIC = "intrinsic"
    """A step that is too long for the loss surface with every factor at its baseline."""
    OUTSIDE = "outside"
    """A change from outside the training step."""
    COMPUTATION = "computation"
    """The same batches and weights now give another loss."""


class SplitVerdict(StrEnum):
    """What causes the jump, by the split."""

    DATA = "data"
    WEIGHTS = "weights"
    BOTH = "both"
    NOISE = "noise"
    NOT_REPRODUCED = "not_reproduced"
    COMPUTATION = "computation"


Direction = Literal["ordinary", "too_long", "wrong_direction", "turned", "turned_throughout", "unclear"]

# -- shares of the jump -----------------------------------------------------------------------------------------------

CONFIRMING_SHARE: Final = 0.5
"""Share of the jump from which a replay confirms a cause (a repair fraction of one half, science.md 3.3)."""
SUPPORTING_SHARE: Final = 0.25
"""Share from which it supports a cause, and from which the lab examines a part further; engineering choice."""
REFUTING_SHARE: Final = 0.1
"""Share up to which it refutes a cause: the jump is the same without it; engineering choice."""
EXAMINED_WEIGHTS_SHARE: Final = 0.1
"""Share from which the lab examines the weights: a bad batch may hide a second fault; engineering choice."""

# -- the split --------------------------------------------------------------------------------------------------------

BELIEVED_ERRORS: Final = 3.0
"""Standard errors from which an effect is believed (3 sigma)."""
SELECTION_ERRORS: Final = 2.0
"""Standard deviations that the split subtracts from a batch's effect, because the batch was selected for its high loss
(winner's curse, science.md 2b.6)."""
ENTWINED_SHARE: Final = 0.5
"""Share of the interaction in the sum of all effects from which batch and weights cannot be separated;
engineering choice."""

# -- step size --------------------------------------------------------------------------------------------------------

WORSENED_IF_HEALTHY: Final = 0.02
"""Share of updates that raise the loss of their own batch in a healthy run (`python benchmarks/lab.py`)."""
WORSENED_IF_CHRONIC: Final = 0.15
"""The same share in a run with too high a rate (`python benchmarks/lab.py`)."""
RHO_IF_CHRONIC: Final = 0.6
"""Median rho between healthy runs and runs with too high a rate: below 0.65 is strong evidence (science.md 2.3)."""
LOG_ODDS_PER_RHO: Final = 15.0
"""Log-odds per unit of rho below it: three to one at 0.07; engineering choice."""
MAX_LOG_ODDS_OF_RHO: Final = 3.0
"""Cap of the log-odds from rho, either way; engineering choice."""
CHRONIC_PROBABILITY: Final = 0.9
"""Probability from which too long steps explain an episode without other evidence; engineering choice."""
DOUBTFUL_PROBABILITY: Final = 0.25
"""Probability from which an outlier batch gets a cooldown test; engineering choice."""
UNKNOWN_PROBABILITY: Final = 0.5
"""Probability of too long steps without a step-size test: even odds, by definition."""
OVERSHOT_SHARE: Final = 0.2
"""Share of overshooting updates from which steps are too long: ten times the share of worsened updates in a healthy
run; engineering choice."""
QUIET_RHO: Final = 0.5
"""Rho below which steps are too long in a run without an episode: nets that train well at a high rate have more;
engineering choice."""

# -- one update -------------------------------------------------------------------------------------------------------

ORDINARY_RHO: Final = 0.5
"""Rho from which a step is ordinary: healthy steps have 0.83 to 0.96, too long ones less than 0 (science.md 2.3)."""
TURNED_SLOPE: Final = -0.01
"""Slope below which a gradient points up its own loss: a hundred times the rounding of float32; engineering choice."""

# -- modules ----------------------------------------------------------------------------------------------------------

CHANGED_OUTPUTS: Final = 3.0
"""Factor from which a module's outputs have changed: ordinary batches differ by less; engineering choice."""
MODE_GAP_CHANGED: Final = 2.0
"""Factor on the ratio of eval to train loss from which the modes have drifted apart; engineering choice."""

# -- other experiments ------------------------------------------------------------------------------------------------

ORDER_LEFT: Final = 2 / 3
"""Share of the excess left after reshuffling up to which the order contributes; engineering choice."""


def confirmed(answers: Iterable[bool | None]) -> bool | None:
    """Whether experiments confirm a cause: yes if one does, no if one refutes it and none confirms, else `None`.

    Args:
        answers: `Observation.confirms` of every observation about the cause.
    """
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None


def share_level(share: float) -> str:
    """The level of a share of the jump: `"confirms"`, `"supports"`, `"undecided"` or `"refutes"`."""
    if share >= CONFIRMING_SHARE:
        return "confirms"
    if share >= SUPPORTING_SHARE:
        return "supports"
    return "refutes" if share <= REFUTING_SHARE else "undecided"


def share_confirms(share: float) -> bool | None:
    """Whether a share of the jump confirms the cause that it tests."""
    return {"confirms": True, "refutes": False}.get(share_level(share))


def tested_share(experiments: Experiments | None, groups: frozenset[Group]) -> float | None:
    """The share of the jump that replay gives to these groups together; `None` where it gives no shares."""
    shares = jump_shares(experiments)
    return sum(shares.get(group, 0.0) for group in groups) if shares and groups else None


def split_refutes(verdict: SplitVerdict, groups: frozenset[Group]) -> bool | None:
    """False where a split without shares (as in a triage) refutes a cause of these groups; it never confirms one."""
    if Group.DATA in groups:
        return False if verdict is SplitVerdict.WEIGHTS else None
    return False if groups and verdict is SplitVerdict.DATA else None


# -- the split --------------------------------------------------------------------------------------------------------


def split_verdict(experiments: Experiments | None) -> SplitVerdict | None:
    """The verdict of the split; `None` without one."""
    if experiments is None:
        return None
    if experiments.outside_change is not None:
        return SplitVerdict.NOT_REPRODUCED
    return None if experiments.split is None else verdict_of(experiments.split)


def verdict_of(split: Split) -> SplitVerdict:
    """Whether batch, weights, both or the computation cause the jump, or whether it is within the noise.

    The effect of the weights is measured in pairs (each control batch under both weights), so it can be significant
    where the jump itself is not.
    """
    if split.computation >= CONFIRMING_SHARE:
        return SplitVerdict.COMPUTATION
    data, weights, interaction = split.data_effect, split.weights_effect, abs(split.interaction_effect)
    by_weights = weights > BELIEVED_ERRORS * split.weights_error and weights > SUPPORTING_SHARE * split.jump
    by_data = data > SUPPORTING_SHARE * split.jump
    if split.jump <= split.noise or (split.jump <= BELIEVED_ERRORS * split.noise and not by_weights):
        return SplitVerdict.NOISE
    if interaction > ENTWINED_SHARE * (abs(data) + abs(weights) + interaction) or by_weights == by_data:
        return SplitVerdict.BOTH
    return SplitVerdict.WEIGHTS if by_weights else SplitVerdict.DATA


# -- step size --------------------------------------------------------------------------------------------------------


def p_chronic(steps: StepSize) -> float:
    """Probability, in [0, 1], that steps are too long throughout the run, at even prior odds.

    Bayes' rule with two binomial rates of worsened updates and with the median rho. A chronically high rate raises the
    loss of few batches, but lowers rho for all of them.
    """
    bad = round(steps.worsened * steps.updates)
    good = steps.updates - bad
    log_odds = bad * math.log(WORSENED_IF_CHRONIC / WORSENED_IF_HEALTHY)
    log_odds += good * math.log((1 - WORSENED_IF_CHRONIC) / (1 - WORSENED_IF_HEALTHY))
    if math.isfinite(steps.rho):
        by_rho = LOG_ODDS_PER_RHO * (RHO_IF_CHRONIC - steps.rho)
        log_odds += min(max(by_rho, -MAX_LOG_ODDS_OF_RHO), MAX_LOG_ODDS_OF_RHO)
    return 1.0 / (1.0 + math.exp(-log_odds))


def is_chronic(steps: StepSize | None) -> bool:
    """Whether steps are too long throughout the run."""
    return steps is not None and p_chronic(steps) >= CHRONIC_PROBABILITY


def steps_too_long(steps: StepSize) -> bool:
    """Whether too long steps explain an episode without other evidence.

    Worsened updates alone are not enough: in healthy runs too, momentum sometimes carries an update up the gradient of
    its own batch. So rho must be low, or too many updates must have overshot down their own gradient.
    """
    return is_chronic(steps) and (steps.rho < RHO_IF_CHRONIC or steps.overshot >= OVERSHOT_SHARE)


def steps_too_long_in_quiet_run(steps: StepSize) -> bool:
    """Whether steps are long enough to report in a run without an episode."""
    return is_chronic(steps) and steps.rho < QUIET_RHO


# -- causes of the jump ---------------------------------------------------------------------------------------------


def jump_shares(experiments: Experiments | None) -> Mapping[Group, float]:
    """Shares of the jump by group, in [0, 1], with sum 1; empty where the experiments give none.

    The batch's part of the jump (with half of the interaction) belongs to the data, as far as it remains after the
    cooldown; the rest belongs to chronically long steps. The weights' part is split like the damage of the located
    update. Two parts of that damage count as long steps: the share of an ordinary batch, and momentum or a batch effect
    that chronically long steps have amplified. A changed computation, or a gradient that points up its own loss, takes
    the place of a too long step.
    """
    if experiments is None:
        return {}
    if experiments.outside_change is not None:
        return outside_shares(experiments.outside_change)
    replay, steps = experiments.replay, experiments.step_size
    if replay is None or not replay.exact:
        return only_steps() if steps is not None and _steps_explain(steps) else {}
    return {} if experiments.split is None else _replayed_shares(experiments, experiments.split, replay.replayed)


def _replayed_shares(experiments: Experiments, split: Split, replayed: float | None) -> Mapping[Group, float]:
    verdict = verdict_of(split)
    if verdict is SplitVerdict.COMPUTATION:
        return _normalised(_raw_shares(Experiments(episode=experiments.episode), split))
    if replayed is None:
        return {}
    if verdict is SplitVerdict.NOISE:
        return only_steps() if is_chronic(experiments.step_size) else {}
    return _normalised(_raw_shares(experiments, split))


def _raw_shares(experiments: Experiments, split: Split) -> dict[Group, float]:
    data, weights = max(split.batch_part, 0.0), max(split.weights_part, 0.0)
    kept = _share_after_cooldown(experiments, split)
    shares = dict.fromkeys(Group, 0.0)
    shares |= {Group.DATA: data * kept, Group.INTRINSIC: data * (1.0 - kept), Group.COMPUTATION: split.computation}
    p = UNKNOWN_PROBABILITY if experiments.step_size is None else p_chronic(experiments.step_size)
    replaced = _replaced(experiments, split)
    for group, part in _damage_parts(experiments.attribution, p).items():
        shares[replaced.get(group, group)] += weights * part
    return shares


def _share_after_cooldown(experiments: Experiments, split: Split) -> float:
    """Share of the batch's part that belongs to the data.

    Where a cooldown test was due but too expensive, the probability that steps are not too long.
    """
    if experiments.cooldown is not None:
        return experiments.cooldown.left
    steps = experiments.step_size
    doubtful = steps is not None and split.batch_part >= SUPPORTING_SHARE and p_chronic(steps) >= DOUBTFUL_PROBABILITY
    return 1.0 - p_chronic(steps) if doubtful and steps is not None else 1.0


def _replaced(experiments: Experiments, split: Split) -> Mapping[Group, Group]:
    if experiments.update is not None and update_direction(experiments.update) in {"turned", "turned_throughout"}:
        return {Group.INTRINSIC: Group.GRADIENT, Group.OPTIMIZER: Group.GRADIENT}
    if experiments.attribution is not None and split.computation >= SUPPORTING_SHARE:
        return {Group.INTRINSIC: Group.COMPUTATION}
    return {}


def _damage_parts(damage: Attribution | None, p: float) -> dict[Group, float]:
    """Parts of an update's damage by group, with sum 1.

    Args:
        damage: The attribution; without one no single update did the damage.
        p: Probability that steps are too long throughout the run.
    """
    if damage is None:
        return {Group.INTRINSIC: p}
    parts = dict.fromkeys(Group, 0.0) | {Group(share.group): max(share.share, 0.0) for share in damage.shares}
    amplified = (Group.OPTIMIZER, Group.DATA) if damage.odd_batch else (Group.OPTIMIZER,)
    parts[Group.INTRINSIC] = max(damage.intrinsic, 0.0) + sum(p * parts[group] for group in amplified)
    parts |= {group: (1.0 - p) * parts[group] for group in amplified}
    if not damage.odd_batch:
        parts = _without_ordinary_batch(parts)
    return _normalised(parts)


def _without_ordinary_batch(parts: dict[Group, float]) -> dict[Group, float]:
    """The parts with that of an ordinary batch given to the other factors, or to the step size without any."""
    of_batch = parts.pop(Group.DATA)
    rest = sum(parts.values())
    return {g: p * (1.0 + of_batch / rest) for g, p in parts.items()} if rest > 0 else {Group.INTRINSIC: of_batch}


def _normalised(shares: Mapping[Group, float]) -> dict[Group, float]:
    whole = sum(shares.values())
    return {group: share / whole for group, share in shares.items()} if whole > 0 else {}


def only_steps() -> Mapping[Group, float]:
    """All of the jump for steps that are too long throughout the run."""
    return MappingProxyType(dict.fromkeys(Group, 0.0) | {Group.INTRINSIC: 1.0})


def _steps_explain(steps: StepSize) -> bool:
    """Whether a step-size test in place of a replay explains the episode; an earlier test is kept only if it does."""
    return steps.source == "earlier" or (steps.source == "present" and steps_too_long(steps))


def outside_shares(change: OutsideChange) -> Mapping[Group, float]:
    """All of the jump for a change from outside, in the optimizer's state or elsewhere.

    Half each where momentum and gradient cannot be separated.
    """
    optimizer = {"optimizer": 1.0, "momentum_or_gradient": 0.5}.get(change_kind(change), 0.0)
    return dict.fromkeys(Group, 0.0) | {Group.OPTIMIZER: optimizer, Group.OUTSIDE: 1.0 - optimizer}


def change_kind(change: OutsideChange) -> str:
    """What was changed, by the experiment; by the writes that were seen where it does not decide."""
    seen = "optimizer" if any(write.kind == "optimizer" for write in change.writes) else "weights"
    if change.kind is None or (change.kind == "momentum_or_gradient" and seen == "optimizer"):
        return seen
    return change.kind


def birth_confirms(found: FirstNonFinite) -> bool | None:
    """Whether the first non-finite value confirms that model or loss create it.

    Undecided where only the weights at the onset do: then the weights may have blown up before.
    """
    if found.phase == "input":
        return False
    return True if found.with_healthy_weights else None


# -- sample order -----------------------------------------------------------------------------------------------------


def order_level(order: SampleOrder) -> str:
    """The level of a reshuffling: `"order"`, `"same in any order"` or `"undecided"`."""
    levels = {"confirms": "order", "refutes": "same in any order"}
    return levels.get(share_level(1.0 - order.left), "undecided")


def order_confirms(order: SampleOrder) -> bool | None:
    """Whether reshuffling confirms that the order is the cause."""
    return share_confirms(1.0 - order.left)


# -- one update, modules, modes ---------------------------------------------------------------------------------------


def update_direction(update: UpdateMeasurement) -> Direction:
    """Whether a step was ordinary, too long, or in a wrong direction (science.md 2.3)."""
    if update.slope is not None and update.slope_usual is not None and update.slope < TURNED_SLOPE:
        if update.slope_usual > ORDINARY_RHO:
            return "turned"
        if update.slope_usual < TURNED_SLOPE:
            return "turned_throughout"
    if update.against is not None and update.against > (update.against_error or 0.0):
        return "wrong_direction"
    if update.rho is None or update.promised >= 0.0:
        return "unclear"
    if update.rho >= ORDINARY_RHO:
        return "ordinary"
    return "too_long" if update.rho < 0.0 else "unclear"


def first_changed_module(measured: ModuleMeasurement) -> ModuleChange | None:
    """The first module in the forward pass with changed outputs; `None` without one."""
    return next((m for m in measured.modules if outputs_changed(m.now, m.usual) >= CHANGED_OUTPUTS), None)


def outputs_changed(now: ModuleActivity, usual: ModuleActivity) -> float:
    """Factor, at least 1, by which a module's outputs changed in size; infinite where they are not finite."""
    return max(factor_between(now.largest, usual.largest), factor_between(now.rms, usual.rms))


def factor_between(a: float, b: float) -> float:
    """Factor, at least 1, between two sizes; infinite where one is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    low, high = sorted((max(abs(a), 1e-30), max(abs(b), 1e-30)))
    return high / low


def mode_gap_change(modes: ModeMeasurement) -> float:
    """Factor on the ratio of eval to train loss since the snapshot; 1 where it is not known."""
    if modes.usual_train is None or modes.usual_eval is None:
        return 1.0
    before = _ratio(modes.usual_eval, modes.usual_train)
    return _ratio(modes.eval, modes.train) / before if before > 0 else 1.0


def _ratio(a: float, b: float) -> float:
    """The ratio of two losses; 1 where it means nothing, as for a loss that is not positive."""
    if math.isfinite(a) and math.isfinite(b):
        return a / b if a > 0 and b > 0 else 1.0
    if math.isfinite(a) == math.isfinite(b):
        return 1.0
    return math.inf if math.isfinite(b) else 0.0
