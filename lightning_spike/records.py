"""The records that the parts exchange: frozen, of plain numbers and strings, without torch and Lightning.

In the order in which they come to be: a training batch becomes a `StepRow`, a validation a `ValidationPoint`; detectors
turn rows into `Episode`s and `Finding`s; actions leave an `Action`; the diagnosis ranks `Verdict`s, each with its
`Evidence`.
"""

import dataclasses
import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class EpisodeKind(StrEnum):
    """The shapes of an episode; the values are those of report.json."""

    SPIKE = "spike"
    DIVERGENCE = "divergence"
    NONFINITE = "nonfinite"
    OSCILLATION = "oscillation"
    STALL = "stall"
    OVERFIT = "overfit"


class Recovery(StrEnum):
    """How far the loss came back after an episode."""

    WHOLE = "whole"
    PART = "part"
    NEVER = "never"
    OPEN = "open"
    """The run is still inside the episode, or ended there too early to tell."""


class Family(StrEnum):
    """The families of causes; the values are those of report.json."""

    DATA = "data"
    LEARNING_RATE = "learning_rate"
    GRADIENT = "gradient"
    NUMERICS = "numerics"
    OPTIMIZER = "optimizer"
    ENVIRONMENT = "environment"
    GENERALIZATION = "generalization"


class RunStatus(StrEnum):
    """Status of a run; the values are those of report.json."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    EXCEPTION = "exception"
    INTERRUPTED = "interrupted"


def number(value: object) -> float | None:
    """A finite number, `None` for anything else: plug-ins and old files may hold what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole_numbers(value: object) -> tuple[int, ...]:
    """The whole numbers of a list; empty for anything that is none."""
    listed = value if isinstance(value, list | tuple) else ()
    return tuple(i for i in listed if isinstance(i, int) and not isinstance(i, bool))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The position of a batch in the run."""

    ordinal: int
    """Batches begun in this run before this one, over all epochs: 0, 1, 2, … The axis of every recorded series."""
    step: int
    """`trainer.global_step` as it stood when the batch began."""
    epoch: int
    """`trainer.current_epoch`."""
    batch_idx: int
    """Position in the epoch; starts again at 0 in each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One training batch, as numbers.

    `values` maps signal names (see `lightning_spike.signals`) to floats; a signal that this batch did not have is
    absent, one that was not finite is there as NaN or ±Inf.
    """

    at: Moment
    values: Mapping[str, float]
    batch_size: int | None = None
    """Samples in the batch, `None` where it cannot be told."""
    usual_batch_size: int | None = None
    """The largest batch size seen so far: a short last batch of an epoch is noisier by sqrt(usual / size)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One vector-valued signal of one batch, as float32 numbers, e.g. the gradient norm of every parameter."""

    at: Moment
    signal: str
    values: Any
    """`numpy.ndarray`, shape `(len(names),)`, float32; the names are kept once in the store under the same signal."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    """One finished validation run."""

    at: Moment
    """The last training batch before it."""
    metric: str
    value: float
    train_loss: float | None = None
    """Mean training loss since the validation before, `None` where there was none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A range of batches with abnormal loss."""

    id: int
    """1, 2, 3, … in order of onset, unique in the run."""
    kind: EpisodeKind
    onset: Moment
    """The first abnormal batch: dated back, not the batch at which it was noticed."""
    noticed: Moment
    """The batch at which it was detected."""
    peak: Moment
    end: Moment | None = None
    """The last abnormal batch; `None` while the loss has not come back."""
    loss_before: float | None = None
    """Median of the accepted losses just before the onset."""
    loss_peak: float | None = None
    """The highest loss inside; ±Inf or NaN where the loss was not finite."""
    recovery: Recovery = Recovery.OPEN
    signal: str = "loss"
    """The series in which it was seen: `"loss"`, `"loss/<name>"` or `"val_loss"`."""
    period: int | None = None
    """Batches between the members of the family of like episodes that this one belongs to, `None` for a single one."""
    severity: float = 0.0
    """Distance of the peak from the usual noise, in robust standard deviations, at most 99."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One observation of a detector or of the lab."""

    detector: str
    """The detector's name: `"learning_rate"`, `"overfit"`, …"""
    kind: str
    """The detector's name of the observation: `"restart"`, `"unexplained_jump"`, …"""
    at: Moment
    detail: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """JSON-able facts; each detector's docstring lists its keys."""

    @property
    def text(self) -> str:
        """The detector's sentence; empty where it gave none."""
        return str(self.detail.get("text", ""))

    def number(self, key: str) -> float | None:
        """A finite number of the detail; `None` for anything else."""
        return number(self.detail.get(key))

    def numbers(self, key: str) -> tuple[float, ...]:
        """The finite numbers of a list in the detail; empty for anything else."""
        listed = self.detail.get(key)
        values = map(number, listed if isinstance(listed, list | tuple) else ())
        return tuple(value for value in values if value is not None)

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        """The whole numbers of a list in the detail; empty for anything else."""
        return whole_numbers(self.detail.get(key))

    def names(self, key: str = "names") -> tuple[str, ...]:
        """The strings of a list in the detail; empty for anything else."""
        listed = self.detail.get(key)
        return tuple(n for n in listed if isinstance(n, str)) if isinstance(listed, list | tuple) else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """An action on the run or a file written for it; as in report.json."""

    action: str
    """`"rollback"`, `"dump"`, `"early_stop"`, `"skip"`, `"restore_best"`, `"replay"` or `"scene"`."""
    at: Moment
    detail: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        """The whole numbers of a list in the detail; empty for anything else."""
        return whole_numbers(self.detail.get(key))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disabled:
    """A part of the suite that failed and was switched off."""

    part: str
    reason: str
    step: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerFacts:
    """One optimizer as it was configured."""

    name: str
    """Lightning's name for it, as in `lr-<name>`: `"AdamW"`, `"SGD-1"` for the second SGD."""
    class_name: str
    groups: tuple[Mapping[str, Any], ...] = ()
    """Per parameter group the hyperparameters that are numbers, booleans or tuples of numbers, as at the start: lr,
    betas, eps, momentum, …"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerFacts:
    """One learning-rate scheduler as Lightning has it configured."""

    class_name: str
    optimizer: str
    """Name of its optimizer, as in `OptimizerFacts.name`."""
    interval: str
    """`"step"` or `"epoch"`."""
    frequency: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """The scheduler's own plain numbers: T_0, T_mult, eta_min, step_size, max_lrs, …"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The settings of a run that do not change while it goes on."""

    started: str
    """ISO 8601, with the offset from UTC."""
    world_size: int = 1
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    """`"norm"` or `"value"`; `None` where Lightning does not clip."""
    clips_by_hand: bool = False
    """The module overrides `configure_gradient_clipping` or optimises by hand: what is clipped is measured, not
    known."""
    automatic_optimization: bool = True
    optimizers: tuple[OptimizerFacts, ...] = ()
    schedulers: tuple[SchedulerFacts, ...] = ()
    batches_per_epoch: int | None = None
    """`None` for a loader without a length."""
    max_steps: int | None = None
    max_epochs: int | None = None
    resumed_from: str | None = None
    """The checkpoint that this run was resumed from."""
    first_step: int = 0
    """`global_step` at which this fit began; above 0 after a resume."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One observation for or against a cause; as in report.json, plus its weight in the ranking."""

    signal: str
    step: int | None
    observed: float | None
    expected: float | None
    text: str
    """One sentence with the numbers in it, for a person."""
    weight: float = 0.0
    """Natural log of the likelihood ratio that this observation gives the cause: > 0 speaks for it, < 0 against it."""
    observation: str = ""
    """Name of the observer that made it; its weight stands under it in `diagnosis/weights.json`."""
    level: str = ""
    """The level of the evidence."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The first fix of a verdict as one setting and its new value, for a program.

    | setting | value |
    | --- | --- |
    | `lr-<optimizer>` (with `/pg<k>`) | the highest rate to use |
    | `warmup_steps` | updates over which the rate should rise to its peak |
    | `schedule` | the rate that the schedule should have had; `None` where only the event must go |
    | `gradient_clip_val` | norm to clip at |
    | `drop_samples` | dataset indices to leave out; `None` where they are not known and the batch itself is to be left
    out |
    | `shuffle`, `input_limit`, `sample_weight_limit`, `normalisation` | what to do to the data, with its limit where it
    is a number |
    | `betas`, `eps`, `momentum`, `weight_decay` | of the optimizer; for `betas` the second of the two |
    | `optimizer_state` | the step of the last healthy snapshot to take it back from, `None` for a fresh start |
    | `initialization`, `activation`, `normalization_layer`, `operation` | in the model: the module or operation to
    change |
    | `loss_scale` | the scale to begin with, `precision` | the precision to train in |
    | `max_steps` | the step to stop at |
    | `code` | the place in the user's own code: `zero_grad`, `train_mode`, `parameters`, `weights`, `all_reduce`,
    `resume` … |
    | `hardware` | the device to check |
    """

    setting: str
    value: float | str | tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One cause as ranked, for one episode or over the run; as in report.json."""

    cause: str
    family: Family
    probability: float
    """In [0, 1]; what the verdicts of an episode leave open up to 1 is "unexplained"."""
    episodes: tuple[int, ...]
    summary: str
    evidence: tuple[Evidence, ...] = ()
    fixes: tuple[str, ...] = ()
    change: Change | None = None
    """The first fix, for a program; `None` where it cannot be put as one setting."""
    confirmed: bool | None = None
    """The replay's result: true, false, or `None` without one."""
