"""Every sentence about an experiment: pure functions from a record of `lightning_spike.experiments` to plain words.

`judgement` decides what a number means. "Control batches" are ordinary batches from before the onset.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from lightning_spike.diagnosis import judgement
from lightning_spike.diagnosis.judgement import Direction, Group, SplitVerdict
from lightning_spike.experiments import (
    Attribution,
    ChangeKind,
    Cooldown,
    Cost,
    Experiments,
    FactorShare,
    FailedMeasurement,
    FirstNonFinite,
    LossScaleMeasurement,
    ModeMeasurement,
    ModuleChange,
    ModuleMeasurement,
    OutsideChange,
    OutsideWrite,
    PrecisionMeasurement,
    Remedy,
    Replay,
    SampleExchange,
    SampleMeasurement,
    SampleOrder,
    Split,
    StepSize,
    TensorDifference,
    UpdateMeasurement,
)

T = TypeVar("T")
OfRank = TypeVar("OfRank", FirstNonFinite, ModuleMeasurement, SampleMeasurement)

MAX_NAMES: Final = 3
"""Names of modules, tensors or causes in one sentence; engineering choice."""
MAX_POSITIONS: Final = 8
"""Positions of samples in one sentence; engineering choice."""
MENTIONED_ZEROS: Final = 0.9
"""Share of zeros from which a ReLU's outputs are mentioned; engineering choice."""
MENTIONED_SATURATION: Final = 0.5
"""Share of saturated outputs from which they are mentioned; engineering choice."""
USUAL_ROUNDING: Final = 0.05
"""Relative difference that low precision makes by rounding alone: bfloat16 has 8 bits, and a loss is a mean of many;
engineering choice."""
HEALTHY_RHO: Final = "0.8 to 1"
"""Measured over promised change in healthy runs (science.md 2.3)."""

FACTORS: Final[Mapping[str, tuple[str, str]]] = {
    "batch": ("batch", "With an ordinary batch"),
    "samples": ("outlier samples", "With ordinary samples in place of the outliers"),
    "learning_rate": ("learning rate", "With the previous learning rate"),
    "clipping": ("clipping", "With the previous clipping"),
    "optimizer_state": ("optimizer state", "With the previous optimizer state"),
    "momentum": ("momentum", "With the previous momentum"),
    "second_moments": ("second moments", "With up-to-date second moments"),
    "epsilon": ("epsilon", "With the default epsilon"),
    "precision": ("low precision", "In float32"),
}
"""Names of the factors of an update, and the words for a replay with the factor at its baseline."""
GROUPS: Final[Mapping[Group, str]] = {
    Group.DATA: "the batch",
    Group.LEARNING_RATE: "the learning rate",
    Group.OPTIMIZER: "the optimizer state",
    Group.CLIPPING: "the gradient clipping",
    Group.NUMERICS: "low precision",
    Group.GRADIENT: "a gradient pointing uphill",
    Group.INTRINSIC: "steps too long for the loss surface",
    Group.OUTSIDE: "a change outside the training step",
    Group.COMPUTATION: "a changed computation",
}
CAUSED_BY: Final[Mapping[SplitVerdict, str]] = {
    SplitVerdict.DATA: "the batch",
    SplitVerdict.WEIGHTS: "the weights",
    SplitVerdict.BOTH: "batch and weights together",
    SplitVerdict.NOISE: "nothing: the loss is within its ordinary scatter",
    SplitVerdict.NOT_REPRODUCED: "something outside the training step",
    SplitVerdict.COMPUTATION: "a changed computation",
}
"""Words for the cause of a loss jump."""
VERDICTS: Final[Mapping[SplitVerdict, str]] = {
    SplitVerdict.DATA: "the batch itself causes the jump, not the weights",
    SplitVerdict.WEIGHTS: "the weights cause the jump, whatever the batch",
    SplitVerdict.BOTH: "batch and weights cause the jump together",
    SplitVerdict.NOISE: "the jump is within the noise between batches",
    SplitVerdict.NOT_REPRODUCED: "the jump is not reproduced",
    SplitVerdict.COMPUTATION: "the same batches and weights now give a higher loss than before",
}
CHANGES: Final[Mapping[ChangeKind | None, str]] = {
    "weights": "Something outside the training step changed the weights",
    "optimizer": "Something outside the training step changed the optimizer state",
    "gradient": "Something outside the training step changed a gradient",
    "momentum_or_gradient": "Something outside the training step changed the optimizer state or a gradient",
    "result": "The forward pass gave another result for the same weights, batch and random state",
    None: "Something that the replay does not repeat made the loss jump",
}
DIRECTIONS: Final[Mapping[Direction, str]] = {
    "ordinary": "The update at step {step} changed its own batch's loss about as its gradient promised.",
    "too_long": "The update at step {step} was too long: it followed its gradient, but its own batch's loss rose.",
    "wrong_direction": "The update at step {step} had a wrong direction: it went uphill for the batches before.",
    "turned": (
        "The gradient at step {step} points uphill: even a tiny step down it raises its own batch's loss. "
        "Earlier in the replay this was not so."
    ),
    "turned_throughout": (
        "All gradients of the replay up to step {step} point uphill: even a tiny step down one raises its own "
        "batch's loss."
    ),
    "unclear": "The update at step {step} was neither clearly too long nor clearly in a wrong direction.",
}
EPISODES: Final[Mapping[str, str]] = {"nonfinite": "a non-finite loss", "overfit": "overfitting"}


# -- numbers and lists ------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """The number with at most three digits: `48,200`, `1.35e-05`; `NaN`, `Inf` or `unknown` where there is none."""
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Inf"
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 1e9:  # noqa: PLR2004 - too long to read as it is
        return f"{rounded:.{digits}g}".replace("e+", "e")
    return f"{rounded:,.0f}" if abs(rounded) >= 1e3 else f"{rounded:.{digits}g}"  # noqa: PLR2004 - thousands


def times(factor: float) -> str:
    """The factor as `×2.02` or `×48,000`."""
    if not math.isfinite(factor):
        return "×Inf" if factor > 0 else "by an unknown factor"
    return f"×{number(factor, 2 if abs(factor) >= 1e3 else 3)}"  # noqa: PLR2004 - two digits do for thousands


def percent(share: float) -> str:
    """Whole percent, `62 %`; 0 and 100 only where it is exactly so, else `<1 %` and `>99 %`."""
    if not math.isfinite(share):
        return "an unknown share"
    if 0.0 < share < 0.01:  # noqa: PLR2004 - less than can be shown
        return "<1 %"
    if 0.99 < share < 1.0:  # noqa: PLR2004 - more than can be shown
        return ">99 %"
    return _whole_percent(share)


def listed(words: Sequence[str]) -> str:
    """The words as `a, b and c`."""
    if not words:
        return "nothing"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _whole_percent(share: float) -> str:
    return f"{number(float(round(100 * share)))} %"


def _with_error(share: float, error: float) -> str:
    """`62 % ± 6 %`, without the error where it is not known."""
    return f"{_whole_percent(share)} ± {_whole_percent(error)}" if math.isfinite(error) else percent(share)


def _count(n: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{n:,} {noun}{plural if n != 1 else ''}"


def _names(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """The first names in quotes, and the number of the others."""
    return _first([f"'{name}'" for name in names], most)


def _first(words: Sequence[str], most: int) -> str:
    left = len(words) - most
    return listed([*words[:most], _count(left, "other")] if left > 0 else words)


def _reason(text: str) -> str:
    """A reason or error without a full stop at its end."""
    return text.strip().rstrip(".") or "no reason is known"


def _joined(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)


def _usually(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f" (usually {number(value)})"


# -- replay and split -------------------------------------------------------------------------------------------------


def replay(replay: Replay) -> str:
    """Whether the replay reproduced the training."""
    batches = f"the {_count(replay.batches, 'batch')} from the last healthy snapshot to the onset"
    if replay.exact:
        return f"Replay of {batches}: every recorded loss is reproduced."
    why = f"Replay of {batches} is not exact: {_reason(replay.failure or '')}."
    if replay.replayed is None:
        return why
    return f"{why} The batch at the onset has loss {number(replay.replayed)} instead of {number(replay.recorded)}."


def split(split: Split, verdict: SplitVerdict) -> str:
    """What causes the jump: batch, weights, both or neither, with the losses."""
    lead = "Without an exact replay" if split.new_weights_are_later else "Replay"
    losses = _control_losses(split) if verdict is SplitVerdict.COMPUTATION else _four_losses(split)
    return f"{lead}: {VERDICTS[verdict]}. {losses}"


def _four_losses(split: Split) -> str:
    (batch_old, batch_new), (old, new) = (map(number, pair) for pair in (split.batch_loss, split.control_loss))
    controls = _count(split.controls, "control batch")
    if split.new_weights_are_later:
        return (
            f"This batch: loss {batch_old} under the snapshot's weights, {batch_new} in the training. "
            f"{controls}: {old} under the snapshot's weights, {new} under later weights{_median(split)}."
        )
    return (
        f"Loss under the snapshot's weights and at the onset: this batch {batch_old} → {batch_new}, "
        f"{controls} {old} → {new}{_median(split)}."
    )


def _control_losses(split: Split) -> str:
    known = split.recorded_control_loss
    recorded = "" if known is None else f"; the training recorded {number(known)}"
    controls, have = _count(split.controls, "control batch"), "has" if split.controls == 1 else "have"
    loss = f"{number(split.control_loss[0])}{_median(split)}"
    return f"Under the snapshot's weights {controls} now {have} loss {loss}{recorded}."


def _median(split: Split) -> str:
    return "" if split.controls == 1 else " (median)"


# -- non-finite values and changes from outside -----------------------------------------------------------------------


def first_nonfinite(found: FirstNonFinite) -> str:
    """Where the first NaN or Inf appears."""
    if found.phase == "input":
        values = "NaN or Inf values" if found.count is None else _count(found.count, "NaN or Inf value")
        return f"The batch itself contains {values}{f' in {found.operation}' if found.operation else ''}."
    where = f"module '{found.module}'" if found.module else "training_step"
    at = f", operation '{found.operation}'" if found.operation else ""
    text = {
        "forward": f"The first NaN or Inf appears in the forward pass, in {where}{at}; its inputs are finite.",
        "loss": f"The first NaN or Inf appears in the loss computation, in {where}{at}; its inputs are finite.",
        "backward": f"The loss is finite; the first NaN or Inf appears in the backward pass, in {where}{at}.",
    }[found.phase]
    return text if found.with_healthy_weights else f"{text} With the snapshot's weights the same batch stays finite."


def outside_change(change: OutsideChange) -> str:
    """What was changed outside the training step, as far as the experiment found it."""
    parts = [_changed_modes(change) if change.kind == "modes" else f"{CHANGES[change.kind]}{_at(change.step)}."]
    parts += [_written(change.writes), _differing(change.different)]
    if change.loss_with_change is not None:
        parts.append(f"A replay with only this change gives loss {number(change.loss_with_change)}.")
    if change.repaired is not None and math.isfinite(change.repaired):
        parts.append(f"Without the change {percent(change.repaired)} of the jump disappears.")
    return _joined(parts)


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step:,}"


def _changed_modes(change: OutsideChange) -> str:
    begin = "In the training" if change.step is None else f"From step {change.step:,} on"
    names = change.eval_modules
    if names is None:
        return f"{begin} modules are in another mode (train or eval) than before."
    return f"{begin} {_in_eval_mode(names) if names else 'all modules are in train mode'}."


def _in_eval_mode(names: Sequence[str]) -> str:
    which = "the whole module" if "" in names else _names(names)
    return f"{which} {'is' if len(names) == 1 or '' in names else 'are'} in eval mode"


def _written(writes: Sequence[OutsideWrite]) -> str:
    names = tuple(dict.fromkeys(name for write in writes for name in write.names))
    return f"Code outside the training step wrote into {_names(names)}." if names else ""


def _differing(different: Sequence[TensorDifference]) -> str:
    largest = [(t.name, t.relative) for t in different[:MAX_NAMES]]
    words = [f"'{name}' {number(size) if math.isfinite(size) else '(no finite ratio)'}" for name, size in largest]
    return f"Largest relative differences between training and replay: {listed(words)}." if words else ""


# -- step size and cooldown -------------------------------------------------------------------------------------------


def step_size(steps: StepSize) -> str:
    """Whether steps are too long for the loss surface, with the measured numbers."""
    test = {
        "replay": "Step-size test in the replay",
        "present": "Step-size test on the present weights",
        "earlier": f"Step-size test{_at(steps.at_step)}, before the episode",
    }[steps.source]
    if steps.updates < 1 or not math.isfinite(steps.worsened):
        return f"{test}: no update could be tested."
    worsened, whose = round(steps.worsened * steps.updates), "its" if steps.updates == 1 else "their"
    healthy, share = percent(judgement.WORSENED_IF_HEALTHY), f"{worsened:,} of {_count(steps.updates, 'update')}"
    raised = f"{share} raised the loss of {whose} own batch (healthy runs: {healthy})."
    promised = f"The median loss change is {number(steps.rho)} times what the gradient promised"
    rho = f"{promised} (healthy runs: {HEALTHY_RHO})." if math.isfinite(steps.rho) else ""
    return _joined([f"{test}: {_steps_are(steps)}.", raised, rho])


def _steps_are(steps: StepSize) -> str:
    too_long = judgement.steps_too_long(steps) if steps.source == "present" else judgement.is_chronic(steps)
    if too_long or steps.source == "earlier":
        return "the steps are too long for the loss surface"
    if judgement.p_chronic(steps) < judgement.DOUBTFUL_PROBABILITY:
        return "the steps have an ordinary length"
    return "whether the steps are too long is undecided"


def cooldown(cooldown: Cooldown) -> str:
    """Whether the batch is still an outlier after updates with a tenth of the learning rate."""
    if cooldown.before <= 0:
        return "Cooldown test: the batch has no excess loss over control batches."
    if not math.isfinite(cooldown.left):
        return "Cooldown test: no finite loss, so it decides nothing."
    cause = "the weights cause the excess loss, because the steps are too long"
    if cooldown.left >= judgement.CONFIRMING_SHARE:
        cause = "the batch itself is abnormal"
    return (
        f"Cooldown test: {cause}. After {_count(cooldown.steps, 'update')} with a tenth of the learning rate, "
        f"{percent(cooldown.left)} of the batch's excess loss remains."
    )


# -- attribution, shares, remedies ------------------------------------------------------------------------------------


def attribution(found: Attribution, *, in_logs: bool = True) -> str:
    """Which update did the damage, and which of its factors.

    Args:
        found: The attribution.
        in_logs: Losses were compared as logarithms, because all of them are positive.
    """
    which = f"the update at step {found.step:,}"
    if found.updates > 1:
        which = f"the {found.updates:,} updates from step {found.step:,} on"
    if found.damage <= 0:
        return f"Replay: {which} did not raise the loss on control batches."
    ordinary = "The batch of this update had an ordinary loss before it."
    if found.updates > 1:
        ordinary = "The batches of these updates had ordinary losses before them."
    raised = f"Replay: {which} {_raised(found.damage, in_logs=in_logs)}."
    return _joined([raised, *_factors(found), _no_effect(found), "" if found.odd_batch else ordinary])


def _raised(damage: float, *, in_logs: bool) -> str:
    if not math.isfinite(damage):
        return "made the loss on control batches non-finite"
    raised = "raised the loss on control batches"
    if not in_logs:
        return f"{raised} by {number(damage)}"
    factor = math.exp(min(damage, 99.0))
    as_percent = factor < 1.1  # noqa: PLR2004 - there a percentage reads better than a factor
    return f"{raised} by {percent(factor - 1.0)}" if as_percent else f"{raised} ({times(factor)})"


def _factors(found: Attribution) -> Iterator[str]:
    """The factors with a share in the damage, and what is left without them."""
    effective = _effective(found.shares)
    if not effective:
        yield "No tested factor explains the increase."
    elif len(effective) == 1 and effective[0].share >= 1.0 - judgement.REFUTING_SHARE:
        part = effective[0]
        at_baseline = FACTORS[part.factor][1] if part.factor in FACTORS else f"With the usual {_factor(part.factor)}"
        yield f"{at_baseline} the increase disappears ({_with_error(part.share, part.error)})."
    else:
        yield f"The increase is due to {_due_to(effective)}."
    yield from (
        f"The {_factor(part.factor)} made the increase smaller ({_with_error(-part.share, part.error)})."
        for part in found.shares
        if part.share < -judgement.REFUTING_SHARE and math.isfinite(part.share)
    )
    if finer := _effective(found.finer):
        yield f"In detail: {_due_to(finer)}."
    if found.intrinsic > judgement.REFUTING_SHARE and math.isfinite(found.intrinsic):
        yield f"With every factor at its usual value, {percent(found.intrinsic)} of the increase remains."


def _effective(shares: Sequence[FactorShare]) -> list[FactorShare]:
    return [part for part in shares if math.isfinite(part.share) and judgement.share_level(part.share) != "refutes"]


def _due_to(shares: Sequence[FactorShare]) -> str:
    words = [f"the {_factor(part.factor)} ({_with_error(part.share, part.error)})" for part in shares]
    return _first(words, MAX_NAMES)


def _factor(name: str) -> str:
    return FACTORS[name][0] if name in FACTORS else name.replace("_", " ")


def _no_effect(found: Attribution) -> str:
    """Factors at their baseline, and those whose share is refuted."""
    small = [part.factor for part in found.shares if abs(part.share) <= judgement.REFUTING_SHARE]
    names = [_factor(name) for name in dict.fromkeys([*small, *found.at_baseline])]
    lead = "Other factors tested" if _effective(found.shares) else "Factors tested"
    return f"{lead}: {', '.join(names)}: no effect." if names else ""


def shares(shares: Mapping[Group, float]) -> str:
    """What the jump is due to, the largest share first."""
    by_size = sorted(((share, group) for group, share in shares.items()), reverse=True)
    large = [(share, group) for share, group in by_size if share > judgement.REFUTING_SHARE]
    if not large:
        return "The experiments do not show what the jump is due to."
    return f"The jump is due to {listed([f'{GROUPS[group]} ({percent(s)})' for s, group in large[:MAX_NAMES]])}."


def remedies(tried: Sequence[Remedy]) -> str:
    """What would have helped; it says nothing about the cause."""
    if not tried:
        return ""
    helped = [remedy for remedy in tried if remedy.repaired >= judgement.SUPPORTING_SHARE]
    if not helped:
        return "No tested remedy would have helped at this update."
    words = [f"{_remedy(remedy)} (−{_whole_percent(min(remedy.repaired, 1.0))})" for remedy in helped]
    words[0] = words[0].replace("(−", "(damage −")
    return f"Would have helped: {listed(words)}. This is a remedy, not evidence of the cause."


def _remedy(tried: Remedy) -> str:
    value = None if tried.value is None or not math.isfinite(tried.value) else number(tried.value)
    return {
        "lower_rate": "a lower learning rate" if value is None else f"the learning rate ×{value}",
        "clip": "gradient clipping" if value is None else f"gradient clipping at norm {value}",
        "reset_state": "an empty optimizer state",
        "float32": "float32",
    }[tried.remedy]


# -- samples ----------------------------------------------------------------------------------------------------------


def sample_exchange(found: SampleExchange) -> str:
    """Whether a few samples carry the batch's excess loss."""
    gone, one = 1.0 - found.left, len(found.positions) == 1
    positions = f"position{'s' * (not one)} {_first([f'{k:,}' for k in found.positions], MAX_POSITIONS)}"
    lead = f"{_count(len(found.positions), 'outlier sample')} of {found.samples:,}"
    if gone >= judgement.CONFIRMING_SHARE:
        lead = f"{lead} {'causes' if one else 'cause'} the batch's high loss"
    else:
        lead = f"{lead} alone {'does' if one else 'do'} not cause the batch's high loss"
    place = "an ordinary sample in its place" if one else "ordinary samples in their place"
    return (
        f"{lead} ({positions}). With {place} the loss is {number(found.without)} instead of {number(found.loss)}"
        f"{_excess_gone(gone)}."
    )


def sample_order(found: SampleOrder) -> str:
    """Whether the order of the samples causes the high losses."""
    lead = "The samples cause the high losses in any order"
    if found.left <= judgement.ORDER_LEFT:
        lead = "The order of the samples causes the high losses"
    before = f" (before: {number(found.usual)})" if math.isfinite(found.usual) else ""
    return (
        f"{lead}. With the samples of the last {_count(found.batches, 'batch')} reshuffled, the mean loss is "
        f"{number(found.shuffled)} instead of {number(found.loss)}{before}{_excess_gone(1.0 - found.left)}."
    )


def _excess_gone(share: float) -> str:
    return f"; {percent(share)} of the excess disappears" if math.isfinite(share) else ""


def samples(measured: SampleMeasurement) -> str:
    """The samples of the batch one by one, beside those of an ordinary batch."""
    return _joined([_sample_losses(measured), _sample_gradient(measured)]) or "No single sample could be measured."


def _sample_losses(measured: SampleMeasurement) -> str:
    if not measured.losses:
        return ""
    position = _highest(measured.losses)
    return (
        f"Sample losses under healthy weights: median {_finite_median(measured.losses)} "
        f"(ordinary batch: {_finite_median(measured.usual_losses)}), "
        f"highest {number(measured.losses[position])} at position {position:,}."
    )


def _sample_gradient(measured: SampleMeasurement) -> str:
    if not measured.gradients or not measured.hardest:
        return ""
    k = _highest(measured.gradients[: len(measured.hardest)])
    usual = measured.usual_gradient
    ordinary = f" (ordinary sample: {number(usual)})" if math.isfinite(usual) else ""
    norm = number(measured.gradients[k])
    return f"The sample at position {measured.hardest[k]:,} has a gradient norm of {norm}{ordinary}."


def _highest(values: Sequence[float]) -> int:
    """Position of the highest value; one that is not finite counts as the highest."""
    return max(range(len(values)), key=lambda k: values[k] if math.isfinite(values[k]) else math.inf)


def _finite_median(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return number(statistics.median(finite)) if finite else "unknown"


# -- single measurements ----------------------------------------------------------------------------------------------


def modules(measured: ModuleMeasurement) -> str:
    """The first module with abnormal outputs, and the one that changed most."""
    changes = measured.modules
    if not changes:
        return "No module's activations could be measured."
    most = changes[_highest([change.factor for change in changes])]
    if most.factor < judgement.CHANGED_OUTPUTS:
        return f"No module's activations or gradients changed by more than {times(most.factor)}."
    first = judgement.first_changed_module(measured)
    parts = ["" if first is None else _first_module(first), "" if most is first else _most_changed(most)]
    return _joined([*parts, _zeros(changes), _saturated(changes)])


def _module(change: ModuleChange) -> str:
    return f"'{change.module}' ({change.kind})" if change.module else f"the LightningModule ({change.kind})"


def _first_module(first: ModuleChange) -> str:
    now, usual = first.now, first.usual
    return (
        f"The first module with abnormal outputs is {_module(first)}: RMS {number(now.rms)}{_usually(usual.rms)}, "
        f"largest {number(now.largest)}{_usually(usual.largest)}."
    )


def _most_changed(most: ModuleChange) -> str:
    if most.now.gradient is not None and most.usual.gradient is not None:
        how = f"gradient norm {number(most.now.gradient)}{_usually(most.usual.gradient)}"
    else:
        how = times(most.factor) if math.isfinite(most.factor) else "its values are non-finite"
    return f"The module that changed most is {_module(most)}: {how}."


def _zeros(changes: Sequence[ModuleChange]) -> str:
    relus = [(change, change.now.zeros, change.usual.zeros) for change in changes if "ReLU" in change.kind]
    return _flat_outputs(relus, MENTIONED_ZEROS, "zero")


def _saturated(changes: Sequence[ModuleChange]) -> str:
    shares = [(change, change.now.saturated or 0.0, change.usual.saturated or 0.0) for change in changes]
    return _flat_outputs(shares, MENTIONED_SATURATION, "saturated")


def _flat_outputs(shares: Sequence[tuple[ModuleChange, float, float]], least: float, what: str) -> str:
    """The first module whose share of flat outputs, now and usually, has come to `least`."""
    flat = (share for share in shares if share[1] >= least > share[2])
    texts = (f"{percent(n)} of the outputs of {_module(c)} are {what} (usually {percent(u)})." for c, n, u in flat)
    return next(texts, "")


def update(measured: UpdateMeasurement) -> str:
    """Whether the update was too long or went in a wrong direction, with the measured numbers."""
    direction = DIRECTIONS[judgement.update_direction(measured)].format(step=f"{measured.step:,}")
    return _joined([direction, _length(measured), _against_second_moment(measured), _against_momentum(measured)])


def _length(measured: UpdateMeasurement) -> str:
    if not math.isfinite(measured.relative_length):
        return "The change of the weights is non-finite."
    usual = measured.length_usual
    ratio = measured.length / usual if usual else math.nan
    compared = f" ({times(ratio)} the usual length)" if math.isfinite(ratio) else ""
    return f"The update changed the weights by {number(measured.relative_length)} of their norm{compared}."


def _against_second_moment(measured: UpdateMeasurement) -> str:
    if measured.rms is None or measured.tensor is None:
        return ""
    size = f"{number(measured.rms)} times" if math.isfinite(measured.rms) else "without finite ratio to"
    return f"The gradient of '{measured.tensor}' is {size} its second-moment estimate{_usually(measured.rms_usual)}."


def _against_momentum(measured: UpdateMeasurement) -> str:
    if measured.cosine is None or not math.isfinite(measured.cosine):
        return ""
    cosine = number(measured.cosine)
    return f"The cosine between momentum and gradient is {cosine}{_usually(measured.cosine_usual)}."


def precision(measured: PrecisionMeasurement) -> str:
    """Whether the loss differs in float32, with the same weights and random state."""
    low, full = number(measured.low), number(measured.float32)
    losses = f"The loss is {low} in {measured.precision} and {full} in float32"
    finite = [math.isfinite(loss) for loss in (measured.low, measured.float32)]
    if not all(finite):
        return f"{losses}{_nonfinite_in(*finite)}."
    if measured.low == measured.float32:
        return f"{losses}: low precision makes no difference."
    apart = abs(measured.low - measured.float32) / max(abs(measured.float32), 1e-30)
    return f"{losses}. The difference is {percent(apart)}; rounding alone makes up to {percent(USUAL_ROUNDING)}."


def _nonfinite_in(low: bool, full: bool) -> str:
    if full:
        return ": low precision causes the non-finite loss"
    return "" if low else ": low precision is not the cause"


def modes(measured: ModeMeasurement) -> str:
    """Whether train and eval mode have drifted apart, and which modules are in eval mode during training."""
    frozen = f"{_in_eval_mode(measured.frozen)} during training." if measured.frozen else ""
    return _joined([*_mode_losses(measured), frozen[:1].upper() + frozen[1:]])


def _mode_losses(measured: ModeMeasurement) -> Iterator[str]:
    train, in_eval = number(measured.train), number(measured.eval)
    if measured.usual_train is None or measured.usual_eval is None:
        same = train == in_eval
        both = f"Train and eval mode give the same loss on a control batch: {train}."
        yield both if same else f"A control batch has loss {train} in train mode and {in_eval} in eval mode."
        return
    change = judgement.mode_gap_change(measured)
    if change >= judgement.MODE_GAP_CHANGED:
        yield "Eval mode became worse than train mode: running statistics no longer fit the weights."
    elif change <= 1.0 / judgement.MODE_GAP_CHANGED:
        yield "Train mode became worse than eval mode: only train mode uses dropout and batch statistics."
    before = f"{number(measured.usual_train)} and {number(measured.usual_eval)}"
    yield f"A control batch has loss {train} in train mode and {in_eval} in eval mode (before: {before})."


def loss_scale(measured: LossScaleMeasurement) -> str:
    """How the gradient scaler's factor has changed."""
    before, now = measured.before, measured.now
    move = f"from {number(before)} to {number(now)}"
    if not (math.isfinite(before) and math.isfinite(now)):
        return f"The loss scale changed {move}."
    if now == before:
        text = f"The loss scale stayed at {number(now)}: no gradient overflowed."
    elif now > before:
        text = f"The loss scale rose {move}."
    else:
        text = f"The loss scale fell {move}: gradients overflowed, and their updates were skipped."
    return text if now >= 1.0 else f"{text} Below 1 it makes gradients smaller than they are."


def failed(failed: FailedMeasurement) -> str:
    """Which measurement failed, and why."""
    return f"The measurement of {failed.measurement.replace('_', ' ')} failed: {_reason(failed.error)}."


def cost(cost: Cost) -> str:
    """What was not tested because of its cost; empty where nothing was left out."""
    if not cost.left_out:
        return ""
    spent = (
        f" The examination took the time of {number(cost.worth)} training steps." if math.isfinite(cost.worth) else ""
    )
    return f"Not tested, because the budget was used up: {'; '.join(cost.left_out)}.{spent}"


# -- a whole examination ----------------------------------------------------------------------------------------------


def jump(experiments: Experiments) -> str:
    """The deciding experiment about the jump, then the shares; empty where none decides."""
    return _joined([_deciding(experiments), _conclusion(experiments)])


def split_or_change(experiments: Experiments) -> str:
    """The outside change, or else the split; empty without either."""
    return _say(outside_change, experiments.outside_change) or _split(experiments)


def _deciding(experiments: Experiments) -> str:
    if experiments.outside_change is None and _only_steps(experiments):
        return _say(step_size, experiments.step_size)
    change = _say(outside_change, experiments.outside_change)
    return change or _attribution(experiments) or _say(cooldown, experiments.cooldown) or _split(experiments)


def _say(sentence: Callable[[T], str], found: T | None) -> str:
    """A sentence about a measurement; empty where it was not made."""
    return "" if found is None else sentence(found)


def _say_of_rank(sentence: Callable[[OfRank], str], found: OfRank | None) -> str:
    """A sentence about a measurement of one rank, with the rank where there are several."""
    text = _say(sentence, found)
    return text if found is None or found.rank is None else f"Rank {found.rank}: {text}"


def _split(experiments: Experiments) -> str:
    verdict = judgement.split_verdict(experiments)
    return "" if experiments.split is None or verdict is None else split(experiments.split, verdict)


def _attribution(experiments: Experiments) -> str:
    """The attribution; losses were compared as logarithms if all of them are positive."""
    compared = experiments.split
    losses = () if compared is None else (*compared.batch_loss, *compared.control_loss)
    in_logs = all(loss > 0 or math.isnan(loss) for loss in losses)
    return _say(lambda found: attribution(found, in_logs=in_logs), experiments.attribution)


def _conclusion(experiments: Experiments) -> str:
    """The shares of the jump; empty where they are not known, or where the sentence on an outside change has them."""
    found = judgement.jump_shares(experiments)
    if not found or experiments.outside_change is not None:
        return ""
    return "These steps explain the episode." if _only_steps(experiments) else shares(found)


def _only_steps(experiments: Experiments) -> bool:
    """Whether too long steps explain the episode although no jump was replayed, or the jump is within the noise."""
    if experiments.step_size is None or not judgement.jump_shares(experiments):
        return False
    is_replayed = experiments.replay is not None and experiments.replay.exact
    return not is_replayed or judgement.split_verdict(experiments) is SplitVerdict.NOISE


def about(experiments: Experiments) -> tuple[str, ...]:
    """All sentences about an examination, in reading order; only the reason where there was none."""
    found = experiments
    if found.not_run is not None:
        return (f"Not examined: {_reason(found.not_run)}.",)
    texts = (
        _say(lambda why: f"The onset could not be replayed: {_reason(why)}.", found.failure),
        _say(replay, found.replay),
        _say_of_rank(first_nonfinite, found.first_nonfinite),
        _say(outside_change, found.outside_change),
        _joined([_split(found), _means(found)]),
        _attribution(found),
        _say(cooldown, found.cooldown),
        _say(step_size, found.step_size),
        _conclusion(found),
        remedies(found.remedies),
        _say(sample_exchange, found.sample_exchange),
        _say(sample_order, found.sample_order),
        _say(update, found.update),
        _say_of_rank(modules, found.modules),
        _say_of_rank(samples, found.samples),
        _say(precision, found.precision),
        _say(modes, found.modes),
        _say(loss_scale, found.loss_scale),
        *map(failed, found.failed),
        _say(cost, found.cost),
    )
    return tuple(filter(None, texts))


def _means(experiments: Experiments) -> str:
    if experiments.split is None or experiments.world_size == 1:
        return ""
    seen = "" if experiments.rank is None else f"; rank {experiments.rank} saw the jump"
    return f"Losses are means over {experiments.world_size:,} ranks{seen}."


def remark_of_other_rank(experiments: Experiments, kind: str, step: int) -> str:
    """For a rank whose own loss did not show the episode: which rank saw it, and what caused it.

    Args:
        experiments: Those of the rank that saw it.
        kind: Kind of the episode, a value of `EpisodeKind`.
        step: `global_step` at its onset.
    """
    rank = "Another rank" if experiments.rank is None else f"Rank {experiments.rank}"
    what = EPISODES.get(kind, f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind.replace('_', ' ')}")
    seen = f"{rank} saw {what} at step {step:,}; this rank's loss did not show it."
    found = about(experiments)[0] if experiments.not_run is not None else jump(experiments)
    return _joined([seen, found])
