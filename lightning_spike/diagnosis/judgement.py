"""The one judge of experiments: every band, every share, and the meaning of "confirmed".

The lab measures and returns numbers (`lightning_spike.experiments`); what they mean is decided here and nowhere else.
Pure; knows neither torch nor Lightning.

A cause is **confirmed** where replay gives at least half of the jump to what the cause is about (a repair fraction of
one half, science.md 3.3), or where an experiment on this very cause answers yes; it is **refuted** where the share is
at most a tenth, or the answer is no; else no experiment decides.
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
    """What a share of the jump can be due to."""

    DATA = "data"
    LEARNING_RATE = "learning_rate"
    OPTIMIZER = "optimizer"
    CLIPPING = "clipping"
    NUMERICS = "numerics"
    GRADIENT = "gradient"
    """A gradient that points up the loss it was made from."""
    INTRINSIC = "intrinsic"
    """A step that is too long for the loss surface with every factor at its baseline."""
    OUTSIDE = "outside"
    """A change that no training step made."""
    COMPUTATION = "computation"
    """The same batches and weights give another loss than before."""


class SplitVerdict(StrEnum):
    """What of the jump a split gives to what."""

    DATA = "data"
    WEIGHTS = "weights"
    BOTH = "both"
    NOISE = "noise"
    NOT_REPRODUCED = "not_reproduced"
    COMPUTATION = "computation"


Direction = Literal["ordinary", "too_long", "wrong_direction", "turned", "turned_throughout", "unclear"]

# -- shares of the jump
# --------------------------------------------------------------------------------------------------

CONFIRMING_SHARE: Final = 0.5
"""Share of the jump from which a replay confirms a cause (a repair fraction of one half, science.md 3.3)."""
SUPPORTING_SHARE: Final = 0.25
"""Share from which it supports one, and from which the lab looks further into a part; engineering choice."""
REFUTING_SHARE: Final = 0.1
"""Share up to which it refutes one: the same jump comes without it; engineering choice."""
LOOKED_INTO_WEIGHTS_SHARE: Final = 0.1
"""Share from which the lab looks into the weights: a second fault may hide behind a batch that stands out far more;
engineering choice."""

# -- the split
# -----------------------------------------------------------------------------------------------------------

BELIEVED_ERRORS: Final = 3.0
"""Standard errors from which an effect is believed (3 sigma)."""
ENTWINED_SHARE: Final = 0.5
"""Share of the interaction in the sum of the magnitudes from which neither batch nor weights can be named alone;
engineering choice."""

# -- step size
# -----------------------------------------------------------------------------------------------------------

WORSENED_IF_HEALTHY: Final = 0.02
"""Share of a healthy run's updates that worsen their own batch's loss, under the random state that the batch had
(`python benchmarks/lab.py`) …"""
WORSENED_IF_CHRONIC: Final = 0.15
"""… and of a run whose rate is too high (the same command)."""
RHO_IF_CHRONIC: Final = 0.6
"""Median rho between healthy runs and such whose rate is too high: below 0.65 it is strong evidence (science.md
2.3)."""
LOG_ODDS_PER_RHO: Final = 15.0
"""Log-odds for each unit of rho below that: three to one within 0.07; engineering choice."""
MAX_LOG_ODDS_OF_RHO: Final = 3.0
"""Log-odds that rho gives at most, either way; engineering choice."""
CHRONIC_PROBABILITY: Final = 0.9
"""Probability from which steps that are too long explain trouble of which nothing else is known; engineering choice."""
DOUBTFUL_PROBABILITY: Final = 0.25
"""Probability from which a batch that stands out is tested under cooled-down weights; engineering choice."""
UNKNOWN_PROBABILITY: Final = 0.5
"""Probability that steps are too long where too few updates tell: even odds."""
OVERSHOT_SHARE: Final = 0.2
"""Share of overshooting updates that is too many: ten times that of worsened ones in a healthy run."""
QUIET_RHO: Final = 0.5
"""Rho below which steps are called too long in a run without an episode: a net that trains well at a brisk rate keeps
more; engineering choice."""

# -- one update
# ----------------------------------------------------------------------------------------------------------

ORDINARY_RHO: Final = 0.5
"""Rho from which a step is ordinary; healthy ones have 0.83 to 0.96, steps that are too long less than 0 (science.md
2.3)."""
TURNED_SLOPE: Final = -0.01
"""Slope below which a gradient points up the loss it was made from; float32 rounding makes a hundredth of that."""

# -- modules
# -------------------------------------------------------------------------------------------------------------

CHANGED_OUTPUTS: Final = 3.0
"""Factor from which a module's outputs have changed: ordinary batches differ by less; engineering choice."""
MODE_GAP_CHANGED: Final = 2.0
"""Factor by which the ratio of eval to train loss must change to be told; engineering choice."""

# -- other experiments
# ---------------------------------------------------------------------------------------------------

ORDER_LEFT: Final = 2 / 3
"""Share of the excess that a reshuffled stretch may keep for the order to have made it: a one-sided stretch stays so in
any order; engineering choice."""
ORDER_CONFIRMED_LEFT: Final = 0.5
"""… up to which the order is the cause: the confirming share is gone …"""
ORDER_REFUTED_LEFT: Final = 0.9
"""… and from which it is not: at most the refuting share is gone."""
FEW_SAMPLES_SHARE: Final = 0.5
"""Share of the excess that must go with the exchanged samples for these few to carry it; engineering choice."""
COOLED_DOWN_LEFT: Final = 0.5
"""Share of the excess left under cooled-down weights from which the batch itself is out of the ordinary; engineering
choice."""
HELPING_SHARE: Final = 0.25
"""Share of the damage that a remedy must take away to be listed; engineering choice."""
MODES_REPAIRED: Final = 0.5
"""Share of the jump that must be gone with the modes of before for the modes to have made it: the confirming share."""


def confirmed(answers: Iterable[bool | None]) -> bool | None:
    """Whether experiments confirm a cause.

    True if one confirms it, false if one refutes it and none confirms, `None` where none decides.

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
    """The share of the jump that replay gives to these groups together; `None` where no replay tells."""
    shares = jump_shares(experiments)
    return sum(shares.get(group, 0.0) for group in groups) if shares and groups else None


def split_refutes(verdict: SplitVerdict, groups: frozenset[Group]) -> bool | None:
    """What a split without shares (a triage, say) says of a cause that is tested by these groups.

    False where it gives the jump to the other side; it never confirms.
    """
    if Group.DATA in groups:
        return False if verdict is SplitVerdict.WEIGHTS else None
    return False if groups and verdict is SplitVerdict.DATA else None


# -- the split
# -----------------------------------------------------------------------------------------------------------


def split_verdict(experiments: Experiments | None) -> SplitVerdict | None:
    """What the split says; `None` without one."""
    if experiments is None:
        return None
    if experiments.outside_change is not None:
        return SplitVerdict.NOT_REPRODUCED
    return None if experiments.split is None else verdict_of(experiments.split)


def verdict_of(split: Split) -> SplitVerdict:
    """Whether batch, weights, both or the computation made the jump, or whether it is within the scatter.

    The weights are judged by pairs, the same batch under both: that tells them from noise where the jump by itself does
    not.
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


# -- step size
# -----------------------------------------------------------------------------------------------------------


def p_chronic(steps: StepSize) -> float:
    """Probability, in [0, 1], that steps are too long all the time, at even prior odds.

    From two binomial rates of worsened updates against each other, and from the median rho: a chronically high rate
    worsens the loss of few batches, and keeps less of its promise with all of them.
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
    """Whether steps are too long all the time."""
    return steps is not None and p_chronic(steps) >= CHRONIC_PROBABILITY


def steps_too_long(steps: StepSize) -> bool:
    """Whether steps are too long for the loss surface, where there is trouble and nothing else is known of it.

    Worsened updates alone do not tell: momentum carries an update up the gradient of its own batch now and then in a
    healthy run too. So too little of what the gradients promised must be kept, or too many updates must have gone down
    their gradient and overshot.
    """
    return is_chronic(steps) and (steps.rho < RHO_IF_CHRONIC or steps.overshot >= OVERSHOT_SHARE)


def steps_too_long_in_quiet_run(steps: StepSize) -> bool:
    """Whether steps are so much too long that it is said of a run without an episode."""
    return is_chronic(steps) and steps.rho < QUIET_RHO


# -- whose the jump is
# ---------------------------------------------------------------------------------------------------


def jump_shares(experiments: Experiments | None) -> Mapping[Group, float]:
    """Shares of the jump by group, in [0, 1], adding up to 1; empty where the experiments do not tell.

    The batch's part of the jump (half of the interaction included) is the data's, as far as it is still there under
    cooled-down weights; the rest of it is due to steps that are too long all along. The weights' part is shared out as
    the damage of the located update is, with two exceptions: an ordinary batch whose step did damage, and momentum or a
    batch's pull that chronically long steps have swung up. Both count as such steps. Where the computation has changed,
    or the gradient points up its own loss, that takes the place of a step that is too long.
    """
    if experiments is None:
        return {}
    if experiments.outside_change is not None:
        return outside_shares(experiments.outside_change)
    replay, split, steps = experiments.replay, experiments.split, experiments.step_size
    if replay is None or not replay.exact:
        return only_steps() if steps is not None and _blames_steps(steps) else {}
    if split is None:
        return {}
    verdict = verdict_of(split)
    if verdict is SplitVerdict.COMPUTATION:
        return _normalised(_raw_shares(Experiments(episode=experiments.episode), split))
    if replay.replayed is None:
        return {}
    if verdict is SplitVerdict.NOISE:
        return only_steps() if is_chronic(steps) else {}
    return _normalised(_raw_shares(experiments, split))


def _raw_shares(experiments: Experiments, split: Split) -> dict[Group, float]:
    data, weights = max(split.batch_part, 0.0), max(split.weights_part, 0.0)
    kept = _kept_when_cool(experiments, split)
    shares = dict.fromkeys(Group, 0.0)
    shares |= {Group.DATA: data * kept, Group.INTRINSIC: data * (1.0 - kept), Group.COMPUTATION: split.computation}
    p = UNKNOWN_PROBABILITY if experiments.step_size is None else p_chronic(experiments.step_size)
    instead = _instead(experiments, split)
    for group, part in _damage_parts(experiments.attribution, p).items():
        shares[instead.get(group, group)] += weights * part
    return shares


def _kept_when_cool(experiments: Experiments, split: Split) -> float:
    """Share of the batch's part that stays the batch's.

    Where the cooldown test was due and could not be afforded, the probability that it would.
    """
    if experiments.cooldown is not None:
        return experiments.cooldown.left
    steps = experiments.step_size
    doubtful = steps is not None and split.batch_part >= SUPPORTING_SHARE and p_chronic(steps) >= DOUBTFUL_PROBABILITY
    return 1.0 - p_chronic(steps) if doubtful and steps is not None else 1.0


def _instead(experiments: Experiments, split: Split) -> Mapping[Group, Group]:
    if experiments.update is not None and update_direction(experiments.update) in {"turned", "turned_throughout"}:
        return {Group.INTRINSIC: Group.GRADIENT, Group.OPTIMIZER: Group.GRADIENT}
    if experiments.attribution is not None and split.computation >= SUPPORTING_SHARE:
        return {Group.INTRINSIC: Group.COMPUTATION}
    return {}


def _damage_parts(damage: Attribution | None, p: float) -> dict[Group, float]:
    """Parts of an update's damage by group, adding up to 1.

    Args:
        damage: The attribution; without one no single update did it, and if steps are too long all the time, they did.
        p: Probability that they are.
    """
    if damage is None:
        return {Group.INTRINSIC: p}
    parts = dict.fromkeys(Group, 0.0) | {Group(share.group): max(share.share, 0.0) for share in damage.shares}
    excusable = (Group.OPTIMIZER, Group.DATA) if damage.odd_batch else (Group.OPTIMIZER,)
    excused = {group: p * parts[group] for group in excusable}
    for group, part in excused.items():
        parts[group] -= part
    parts[Group.INTRINSIC] = max(damage.intrinsic, 0.0) + sum(excused.values())
    if not damage.odd_batch:
        parts = _without_ordinary_batch(parts)
    return _normalised(parts)


def _without_ordinary_batch(parts: dict[Group, float]) -> dict[Group, float]:
    """An ordinary batch is what everything else met: its part is theirs.

    Where nothing else stands out it is the length of the step.
    """
    of_batch = parts.pop(Group.DATA)
    rest = sum(parts.values())
    return {g: p * (1.0 + of_batch / rest) for g, p in parts.items()} if rest > 0 else {Group.INTRINSIC: of_batch}


def _normalised(shares: Mapping[Group, float]) -> dict[Group, float]:
    whole = sum(shares.values())
    return {group: share / whole for group, share in shares.items()} if whole > 0 else {}


def only_steps() -> Mapping[Group, float]:
    """All of it is due to steps that are too long all the time."""
    return MappingProxyType(dict.fromkeys(Group, 0.0) | {Group.INTRINSIC: 1.0})


def _blames_steps(steps: StepSize) -> bool:
    """Whether a step-size test in place of a replay gives the trouble to the steps.

    An earlier one was made because they were too long.
    """
    return steps.source == "earlier" or (steps.source == "present" and steps_too_long(steps))


def outside_shares(change: OutsideChange) -> Mapping[Group, float]:
    """All of it came from outside the training step.

    Into the optimizer's state, or into weights, gradients, modes or the result; even odds where momentum and gradient
    cannot be told apart.
    """
    optimizer = {"optimizer": 1.0, "momentum_or_gradient": 0.5}.get(change_kind(change), 0.0)
    return dict.fromkeys(Group, 0.0) | {Group.OPTIMIZER: optimizer, Group.OUTSIDE: 1.0 - optimizer}


def change_kind(change: OutsideChange) -> str:
    """What was changed; where the experiment does not say, or cannot tell momentum and gradient apart, what was seen to be written into."""
    seen = "optimizer" if any(write.kind == "optimizer" for write in change.writes) else "weights"
    if change.kind is None or (change.kind == "momentum_or_gradient" and seen == "optimizer"):
        return seen
    return change.kind


def birth_confirms(found: FirstNonFinite) -> bool | None:
    """Whether a first non-finite value confirms that the model or loss makes it.

    Where only the weights of the onset do, it may just be where they ended.
    """
    if found.phase == "input":
        return False
    return True if found.with_healthy_weights else None


# -- sample order
# --------------------------------------------------------------------------------------------------------


def order_level(order: SampleOrder) -> str:
    """What reshuffling says: `"order"`, `"same in any order"` or `"undecided"`."""
    if order.left <= ORDER_CONFIRMED_LEFT:
        return "order"
    return "same in any order" if order.left >= ORDER_REFUTED_LEFT else "undecided"


def order_confirms(order: SampleOrder) -> bool | None:
    """Whether reshuffling confirms that the order is the cause."""
    return {"order": True, "same in any order": False}.get(order_level(order))


# -- one update, modules, modes
# ------------------------------------------------------------------------------------------


def update_direction(update: UpdateMeasurement) -> Direction:
    """Whether a step was too long or went in a wrong direction (science.md 2.3)."""
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
    """The first module in the forward pass whose outputs have changed in size; `None` if none has."""
    return next((m for m in measured.modules if outputs_changed(m.now, m.usual) >= CHANGED_OUTPUTS), None)


def outputs_changed(now: ModuleActivity, usual: ModuleActivity) -> float:
    """Factor, at least 1, by which a module's outputs changed in size; infinite where they are not finite any more."""
    return max(factor_between(now.largest, usual.largest), factor_between(now.rms, usual.rms))


def factor_between(a: float, b: float) -> float:
    """How many times one size is the other, whichever is larger; infinite where one is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    low, high = sorted((max(abs(a), 1e-30), max(abs(b), 1e-30)))
    return high / low


def mode_gap_change(modes: ModeMeasurement) -> float:
    """Factor by which the ratio of eval loss to train loss has changed since the snapshot; 1 where that is not known."""
    if modes.usual_train is None or modes.usual_eval is None:
        return 1.0
    before = _ratio(modes.usual_eval, modes.usual_train)
    return _ratio(modes.eval, modes.train) / before if before > 0 else 1.0


def _ratio(a: float, b: float) -> float:
    """1 where it means nothing: a loss that is not positive."""
    if math.isfinite(a) and math.isfinite(b):
        return a / b if a > 0 and b > 0 else 1.0
    if math.isfinite(a) == math.isfinite(b):
        return 1.0
    return math.inf if math.isfinite(b) else 0.0
