"""The lab's measurements of one episode: frozen records of plain numbers, without torch, sentences or judgement.

The lab fills one `Experiments` for each examined episode. The store keeps it, report.json holds it (`codec`), and
`diagnosis` reads it: `diagnosis.judgement` decides what a number means, `diagnosis.sentences` puts it into words. So a
later version can rank an old report again.

A loss difference is a difference of log losses where all losses are positive, else of the losses ("loss units" below).
"""

import dataclasses
import math
from typing import Literal

from lightning_spike.records import Moment

ChangeKind = Literal["weights", "optimizer", "gradient", "momentum_or_gradient", "result", "modes"]
Phase = Literal["input", "forward", "loss", "backward"]
RemedyName = Literal["lower_rate", "clip", "reset_state", "float32"]
WriteKind = Literal["weights", "optimizer"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The run from the last healthy snapshot to the onset, repeated with the recorded batches, settings and seeds."""

    batches: int
    """From the snapshot to the onset."""
    recorded: float
    """Loss of the suspect batch in the training."""
    replayed: float | None
    """The same loss in the replay; `None` where the replay did not reach it."""
    differs_at: int | None
    """Ordinal of the first batch whose loss differs from the recorded one; `None` if none does."""
    failure: str | None = None
    """Why there is no exact replay; `None` where every loss was reproduced."""

    @property
    def exact(self) -> bool:
        """Whether every loss up to the onset was reproduced."""
        return self.failure is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The split of the jump into batch and weights: old and new weights, on the suspect batch and on control batches.

    The four means are Y00 (controls, old weights), Y01 (batch, old), Y10 (controls, new) and Y11 (batch, new); "old"
    are the snapshot's weights, "new" those at the onset. All effects are in loss units.
    """

    jump: float
    """Y11 - Y00, plus `computation_effect`."""
    data_effect: float
    """Y01 - Y00 minus two standard deviations of the batches, because the batch was selected for its high loss
    (winner's curse); at least 0."""
    weights_effect: float
    """Y10 - Y00."""
    interaction_effect: float
    """The rest of the jump, which needs both; not corrected for selection."""
    computation_effect: float
    """Loss of the controls under the old weights minus the loss that the training recorded for them."""
    weights_error: float
    """Standard error of `weights_effect`, from control batch to control batch."""
    excess: float
    """Loss of the batch minus that of the controls, under the new weights."""
    noise: float
    """Standard deviation of the jump from the ordinary scatter of batches alone."""
    controls: int
    """Control batches."""
    batch_loss: tuple[float, float]
    """Loss of the suspect batch, under old and new weights."""
    control_loss: tuple[float, float]
    """Median loss of the controls, under old and new weights."""
    recorded_control_loss: float | None = None
    """Median that the training recorded for the controls; `None` where that is not known."""
    new_weights_are_later: bool = False
    """Without an exact replay, the new weights are those of some updates after the onset."""

    @property
    def data(self) -> float:
        """Share of the jump, in [0, 1], that the batch has under the old weights too."""
        return self._share(self.data_effect)

    @property
    def weights(self) -> float:
        """Share of the jump, in [0, 1], that the control batches have under the new weights too."""
        return self._share(self.weights_effect)

    @property
    def interaction(self) -> float:
        """Share of the jump, in [-1, 1], that needs both batch and weights."""
        if self.jump == 0:
            return 0.0
        return math.copysign(min(abs(self.interaction_effect / self.jump), 1.0), self.interaction_effect)

    @property
    def computation(self) -> float:
        """Share of the jump, in [0, 1], that control batches have under the old weights."""
        return self._share(self.computation_effect)

    @property
    def batch_part(self) -> float:
        """The batch's part of the jump with half of the interaction: its Shapley value."""
        return self.data + self.interaction / 2

    @property
    def weights_part(self) -> float:
        """The weights' part, with the other half."""
        return self.weights + self.interaction / 2

    def _share(self, effect: float) -> float:
        return min(max(effect / self.jump, 0.0), 1.0) if self.jump > 0 else 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FirstNonFinite:
    """Where the first NaN or Inf appears when the batch is run."""

    phase: Phase
    """`"loss"`: outside all modules that have parameters or pass activations on, after the last of them, or in a loss
    module."""
    module: str | None
    """Name of the submodule, `""` for the LightningModule itself; `None` for the input, or where it is not known."""
    operation: str | None
    """As torch calls it: `"log"`, `"_softmax"`, in the backward pass `"SqrtBackward0"`; for the input the path of the
    leaf."""
    count: int | None = None
    """Values of the input that are not finite; `None` for another phase."""
    with_healthy_weights: bool = True
    """It appears under the snapshot's weights too; false: only under those at the onset."""
    rank: int | None = None
    """The rank whose batch it was; `None` on a single one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """The step-size test: measured loss changes against the first-order promise of the gradients (science.md 2.3)."""

    rho: float
    """Median over the updates of the change of the batch's own loss over `g . u`, the promised change: 1 for a step
    that is short against the curvature, below 0 for one that overshot so far that the loss rose. NaN where no gradient
    promised anything."""
    worsened: float
    """Share of the updates after which their own batch's loss was higher than before."""
    against: float
    """Share of the updates that went up the gradient of their own batch (`g . u > 0`): carried by momentum."""
    overshot: float
    """Share of the updates that went down the gradient of their own batch and so far that its loss rose."""
    updates: int
    source: Literal["replay", "present", "earlier"] = "replay"
    """Origin of the updates: the replay up to the onset, the newest batches on the present weights, or an earlier such
    test."""
    at_step: int | None = None
    """`global_step` at which an earlier test was made; `None` for the other sources."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSizeTest:
    """A step-size test in a run without an episode."""

    at: Moment
    result: StepSize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cooldown:
    """The cooldown test: the batch against control batches before and after updates with a tenth of the rate."""

    before: float
    """Excess of the batch over the controls under the weights at the onset, in loss units."""
    after: float
    """The same after the repeated updates."""
    steps: int
    """Updates that were repeated."""

    @property
    def left(self) -> float:
        """Share of the batch's excess that is left, in [0, 1]; 1 where there was none."""
        return min(max(self.after / self.before, 0.0), 1.0) if self.before > 0 else 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactorShare:
    """The share of one factor in the damage of an update."""

    factor: str
    """`"batch"`, `"samples"`, `"learning_rate"`, `"clipping"`, `"optimizer_state"`, `"momentum"`, `"second_moments"`,
    `"epsilon"` or `"precision"`."""
    group: str
    """`"data"`, `"learning_rate"`, `"clipping"`, `"optimizer"` or `"numerics"`."""
    share: float
    """Shapley share of the damage; a negative one made it smaller."""
    error: float
    """Standard error of it, from control batch to control batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The damage of one or a few updates, split among the factors that were not at their baseline.

    Shares and `intrinsic` add up to 1.
    """

    ordinal: int
    """The batch that closed the first of the updates."""
    step: int
    updates: int
    damage: float
    """Mean rise of the control batches' losses over the updates, in loss units."""
    shares: tuple[FactorShare, ...]
    """Largest first."""
    finer: tuple[FactorShare, ...]
    """Parts of the largest of them, or of the remainder, from a factorial of the same damage."""
    odd_batch: bool
    """The update's own batch lay more than two standard deviations above ordinary batches before the update."""
    intrinsic: float
    """Share of the damage that is left with every factor at its baseline."""
    at_baseline: tuple[str, ...]
    """Factors that were at their baseline, so could not contribute."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A safer setting at the damaging update, and the share of the damage that it takes away.

    A remedy is no evidence of the cause.
    """

    remedy: RemedyName
    value: float | None
    """The factor on the learning rate, or the gradient norm that is clipped to."""
    repaired: float
    """Share of the damage that is gone: 1 for all of it, below 0 if it got worse."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor that differs between the training and the replay."""

    name: str
    """The module's name for it, or `"<place of the parameter>.<state>"` for an optimizer's."""
    kind: WriteKind
    relative: float
    """L2 norm of the difference over that of the replayed tensor; infinite where that is 0 or something is not
    finite."""
    elements: int
    changed: int
    """Elements that differ by more than rounding."""
    powers_of_two: int
    """Changed elements that are a power of two times what they were: what a flipped bit of the exponent or the sign
    does."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutsideWrite:
    """An in-place write into weights or optimizer state that no training step makes."""

    ordinal: int
    """The batch during or after which it was made."""
    kind: WriteKind
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutsideChange:
    """A change from outside the training step: the replay has a healthy loss where the training did not."""

    ordinal: int | None
    """First batch whose loss differs."""
    step: int | None
    kind: ChangeKind | None
    """What was changed, if known; `"result"`: weights, batch and random state were the same, but the result differs."""
    writes: tuple[OutsideWrite, ...] = ()
    """Writes that were seen just before."""
    different: tuple[TensorDifference, ...] = ()
    """Tensors that differ, the most different first; at most eight."""
    eval_modules: tuple[str, ...] | None = None
    """For `"modes"`: the outermost modules in eval mode from the change on, `("",)` for the whole module; `None` for
    another kind."""
    loss_with_change: float | None = None
    """Loss of the batch in a replay with only this change."""
    repaired: float | None = None
    """Share of the jump, in [0, 1], that disappears in a replay without the change."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleExchange:
    """The batch with its outlier samples replaced by ordinary ones."""

    positions: tuple[int, ...]
    samples: int
    """In the batch."""
    loss: float
    """Loss of the batch as recorded."""
    without: float
    """Loss with the ordinary samples."""
    left: float
    """Share of the batch's excess over ordinary batches that is left, in [0, 1]."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """The last stretch of batches, trained on again with the samples in another order."""

    batches: int
    usual: float
    """Median loss before the stretch."""
    loss: float
    """Mean over the stretch as recorded."""
    shuffled: float
    """Mean over the stretch with its samples reshuffled."""
    left: float
    """Share of the mean's excess over the usual loss that is left, in [0, 1]."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleActivity:
    """The outputs of one module in one forward pass, and its gradient."""

    largest: float
    """Largest magnitude of its outputs."""
    rms: float
    zeros: float
    """Share of outputs that are exactly 0."""
    saturated: float | None
    """Share of outputs of a sigmoid or tanh at its ends; `None` for other modules."""
    gradient: float | None
    """L2 norm of the gradient of the module's own parameters; `None` without any."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module: the suspect batch with the weights at the onset, against an ordinary batch with the snapshot's."""

    module: str
    kind: str
    """Its class."""
    now: ModuleActivity
    usual: ModuleActivity
    factor: float
    """Largest factor by which largest output, RMS or gradient changed, at least 1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleMeasurement:
    """The modules that changed most, at most eight, in the order of the forward pass."""

    modules: tuple[ModuleChange, ...]
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMeasurement:
    """One update; `None` where the optimizer has no such state or there were too few updates before."""

    ordinal: int
    """The batch that closed it."""
    step: int
    tensor: str | None
    """The parameter with the largest `rms`."""
    rms: float | None
    """sqrt(mean(g^2 / max(v, eps^2))) of that parameter, with the second moment v from *before* the update
    (bias-corrected; Wortsman et al. 2023)."""
    rms_usual: float | None
    """The median of the same parameter's in the updates before."""
    cosine: float | None
    """Of the momentum before the update with its gradient, over all parameters."""
    cosine_usual: float | None
    length: float
    """L2 norm of the change of the parameters."""
    relative_length: float
    """`length` over the norm of the parameters."""
    length_usual: float | None
    """Median length of the updates before."""
    promised: float
    """`g . u`, the first-order change of the loss: negative for a step down its own gradient."""
    rho: float | None
    """Measured change of the loss of the update's own batches over `promised`."""
    slope: float | None
    """Measured over promised change for a step down the update's own gradient too short to overshoot: 1 for a true
    gradient, below 0 for one that points up its own loss. Measured in float32, where `rho` is below 0.5."""
    slope_usual: float | None
    """The same for the earliest update of the replay, where `slope` is below 0."""
    against: float | None
    """Mean cosine of the step with the gradients of the updates just before; above 0 the step goes up those losses."""
    against_error: float | None
    """Its standard error."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionMeasurement:
    """The loss of one batch with the same weights and random state in two precisions."""

    precision: str
    """The trainer's."""
    low: float
    """As the training computes it."""
    float32: float
    """Without autocast."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModeMeasurement:
    """The losses of one ordinary batch in train and eval mode."""

    train: float
    """Under the weights at the onset."""
    eval: float
    usual_train: float | None
    """Under the snapshot's weights; `None`, as the next one, where the modes make no difference at the onset."""
    usual_eval: float | None
    frozen: tuple[str, ...]
    """Outermost modules that are in eval mode though the whole is not; `("",)` where all of it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleMeasurement:
    """The gradient scaler's factor."""

    before: float
    """In the snapshot."""
    now: float
    """When the episode was examined."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleMeasurement:
    """The samples of the suspect batch one by one, under healthy weights, and those of an ordinary batch."""

    losses: tuple[float, ...]
    """By position in the batch."""
    usual_losses: tuple[float, ...]
    gradient_bounds: tuple[float, ...] | None
    """Upper bound of each sample's gradient norm, from its activations; `None` where no layer could be watched."""
    usual_gradient_bounds: tuple[float, ...] | None
    hardest: tuple[int, ...]
    """Positions of the few samples with the largest bounds."""
    gradients: tuple[float, ...]
    """L2 norm of the gradient of each of them alone."""
    usual_gradient: float
    """The same of the median sample of the ordinary batch."""
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailedMeasurement:
    """A measurement that raised."""

    measurement: str
    """Name of the field of `Experiments` that is missing for it."""
    error: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of the examination."""

    steps: int
    """Runs of `training_step`."""
    updates: int
    """Optimizer updates made."""
    worth: float
    """In training steps of this run, by time."""
    left_out: tuple[str, ...] = ()
    """Experiments that did not fit into the budget."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiments:
    """All measurements of one episode; `None` for what was not measured."""

    episode: int
    """Its id."""
    not_run: str | None = None
    """Why the episode was not examined; `None` where it was."""
    failure: str | None = None
    """Why the onset could not be replayed, where other experiments were made instead."""
    rank: int | None = None
    """The rank whose batch was examined; `None` on a single one."""
    world_size: int = 1
    extent: Literal["full", "triage"] = "full"
    replay: Replay | None = None
    split: Split | None = None
    first_nonfinite: FirstNonFinite | None = None
    outside_change: OutsideChange | None = None
    step_size: StepSize | None = None
    cooldown: Cooldown | None = None
    attribution: Attribution | None = None
    remedies: tuple[Remedy, ...] = ()
    sample_exchange: SampleExchange | None = None
    sample_order: SampleOrder | None = None
    modules: ModuleMeasurement | None = None
    update: UpdateMeasurement | None = None
    precision: PrecisionMeasurement | None = None
    modes: ModeMeasurement | None = None
    loss_scale: LossScaleMeasurement | None = None
    samples: SampleMeasurement | None = None
    failed: tuple[FailedMeasurement, ...] = ()
    cost: Cost | None = None


def joined(first: Experiments, second: Experiments) -> Experiments:
    """Merge two records of the same episode: fields of the second win, failed measurements add up."""
    defaults = Experiments(episode=first.episode)
    new = {
        field.name: getattr(second, field.name)
        for field in dataclasses.fields(Experiments)
        if getattr(second, field.name) != getattr(defaults, field.name)
    }
    return dataclasses.replace(first, **new | {"failed": (*first.failed, *second.failed)})
