"""`Fault`: base of the fault injectors, with their timing, strength and clean-up."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import number, whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.wrapping import wrap

T = TypeVar("T")


class Needs(StrEnum):
    """Requirements of a fault on the run; a run without them raises a `ConfigurationError`."""

    FLOAT_INPUT = "an input with floating-point values in the batch"
    INTEGER_INPUT = "an input with whole numbers (tokens) in the batch"
    TARGET = "a target in the batch"
    WEIGHT = "sample weights in the batch"
    AUTOMATIC_OPTIMIZATION = "automatic optimisation"
    ADAM = "an optimizer with a second moment (Adam, AdamW)"
    MOMENTUM = "an optimizer with momentum"
    HIDDEN_LAYERS = "at least one layer before the last"
    ACTIVATIONS = "an activation module, a recurrent layer or a Transformer layer of torch"
    WEIGHT_DECAY = "an optimizer with weight decay as a setting"
    LOSS_SCALER = "mixed precision with a gradient scaler"
    RANKS = "more than one rank"
    RESUME = "a run that is resumed: fit(ckpt_path=...)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Meaning and range of a fault's strength."""

    means: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Immutable description of a fault, the label in a benchmark."""

    fault: str
    """The class."""
    cause: str | None
    """The id of the expected cause; `None` if the catalogue has none."""
    at: int
    """Ordinal of its first batch: batches begun in the whole run before it, from 0."""
    strength: float
    strength_means: str
    length: int | None
    """Number of batches; `None` to the end of the run."""
    seed: int
    options: Mapping[str, Any]
    """Its other arguments."""


class Fault(Callback):
    """Base of the fault injectors: a callback that injects one defect for some batches.

    Add it anywhere in `Trainer(callbacks=[...])`, or under `trainer.callbacks` in a LightningCLI YAML. Before the batch
    `at` the run is bit-identical to one without it, unless `FROM_START` is true. The fault has its own random generator
    and restores everything when the fit ends or raises. `mild` and `strong` give two strengths for small trainings.

    A `training_step` that takes `dataloader_iter` draws its batches past all hooks, so faults of the batch do not
    reach it.

    A new fault is a new file in `lightning_spike/testing/faults/` with a subclass that sets `cause`, `SCALE`, `MILD`
    and `STRONG` and overrides `prepare`, `begin` or `before_batch`.

    Args:
        at: The batch that it begins at: batches begun in the whole run before it, from 0, over epochs and resumes.
        strength: How strong; what that means stands with each fault.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the fault's own random numbers.

    Raises:
        ConfigurationError: An argument is out of its range. At the start of a fit or at the batch: the run lacks one of
            the fault's `NEEDS`.
    """

    cause: ClassVar[str | None]
    """The id of the expected cause, `None` for a harmless oddity or a fault that no cause covers."""
    SCALE: ClassVar[Scale]
    """Meaning and range of `strength`."""
    MILD: ClassVar[Mapping[str, Any]]
    """Arguments of the milder of two variants."""
    STRONG: ClassVar[Mapping[str, Any]]
    """Arguments of the stronger of two variants."""
    NEEDS: ClassVar[frozenset[Needs]] = frozenset()
    """Requirements on the run."""
    TYPICAL_ONSET: ClassVar[int] = 200
    """First batch in a benchmark, when the training is under way; 0 for a fault from the start."""
    TYPICAL_DURATION: ClassVar[int] = 100
    """Batches after that one within which it must be noticed."""
    FROM_START: ClassVar[bool] = False
    """Whether losses before `at` differ from those of a run without the fault."""

    def __init__(self, at: int, strength: float, length: int | None = 1, seed: int = 0) -> None:
        name = type(self).__name__
        scale = self.SCALE
        self.at = whole_number(f"{name}(at)", at, at_least=0, do="Use the number of batches begun before it, from 0.")
        self.strength = number(
            f"{name}(strength)",
            strength,
            above=scale.above,
            at_least=scale.at_least,
            at_most=scale.at_most,
            do=f"It is {scale.means}.",
        )
        self.length = length
        if length is not None:
            whole_number(f"{name}(length)", length, at_least=1, do="Use batches, or None for the rest of the run.")
        self.seed = whole_number(f"{name}(seed)", seed, at_least=0, do="Use 0 for the default.")
        self._options: dict[str, Any] = {}
        self._begun = 0
        self._first_step: int | None = None
        self._end_step: int | None = None
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def mild(cls, at: int, **options: Any) -> Self:
        """The milder variant at this batch; `options` override its arguments."""
        return cls(at=at, **{**cls.MILD, **options})

    @classmethod
    def strong(cls, at: int, **options: Any) -> Self:
        """The stronger variant at this batch; `options` override its arguments."""
        return cls(at=at, **{**cls.STRONG, **options})

    @property
    def description(self) -> Description:
        """The fault's immutable description."""
        return Description(
            fault=type(self).__name__,
            cause=self.cause,
            at=self.at,
            strength=self.strength,
            strength_means=self.SCALE.means,
            length=self.length,
            seed=self.seed,
            options=MappingProxyType(dict(self._options)),
        )

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Checks requirements before the fit starts, when optimizers and schedulers exist; changes nothing yet."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Starts the fault, once, before its first batch."""

    def end(self) -> None:
        """Ends the fault; called after every batch that is not one of its own."""

    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        """Returns the batch to train on, for each batch of the fault, before any callback sees it."""
        del trainer, module, ordinal
        return batch

    def is_on(self, trainer: Trainer) -> bool:
        """Whether the current step is one of the fault's, also in a replay."""
        if self._first_step is None or trainer.global_step < self._first_step:
            return False
        return self._end_step is None or trainer.global_step < self._end_step

    def lasts(self, ordinal: int) -> bool:
        """Whether the batch with this ordinal is one of the fault's."""
        return ordinal >= self.at and (self.length is None or ordinal < self.at + self.length)

    def later(self, undo: Callable[[], None]) -> None:
        """Registers a function to call when the fit ends."""
        self._undo.append(undo)

    def require(self, found: T, need: Needs | str, given: object) -> T:
        """Returns `found`.

        Raises:
            ConfigurationError: It is empty or false: the run lacks what the fault needs.
        """
        if not found:
            place = f"Trainer(callbacks=[{type(self).__name__}])"
            raise ConfigurationError.of(
                place,
                expected=str(need),
                given=given,
                do="This fault cannot happen here: leave it out.",
            )
        return found

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._begun, self._first_step, self._end_step = 0, None, None

        def transferred(call: Callable[..., Any], batch: Any, dataloader_idx: int) -> Any:
            return self._arrived(trainer, pl_module, call(batch, dataloader_idx))

        for owner in (pl_module, getattr(trainer, "datamodule", None)):  # Lightning calls exactly one of the two
            if owner is not None:
                self.later(wrap(owner, "on_after_batch_transfer", transferred))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prepare(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun += 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.lasts(self._begun):
            return
        self.end()
        if self._end_step is None and self._first_step is not None:
            self._end_step = trainer.global_step

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._put_back()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continues the count of batches of a resumed run."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._begun = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("ready", 0)

    def _arrived(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        """Returns the batch to train on, once it is on its device; validation and skipped batches are unchanged."""
        if not trainer.training or batch is None or not self.lasts(self._begun):
            return batch
        if self._first_step is None:
            self._first_step = trainer.global_step
            self.begin(trainer, module)
        return self.before_batch(trainer, module, batch, self._begun)

    def _put_back(self) -> None:
        while self._undo:
            self._undo.pop()()


class OneOffFault(Fault):
    """A fault that happens once, before the batch `at`.

    Args:
        at: The batch that it happens before: batches begun in the whole run, from 0.
        strength: How strong; what that means stands with each fault.
        seed: Of the fault's own random numbers.
    """

    def __init__(self, at: int, strength: float, seed: int = 0) -> None:
        super().__init__(at, strength, 1, seed)


class LastingFault(Fault):
    """A fault that lasts, to the end of the run where no length is given.

    Args:
        at: The batch that it begins at: batches begun in the whole run before it, from 0.
        strength: How strong; what that means stands with each fault.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the fault's own random numbers.
    """

    def __init__(self, at: int, strength: float, length: int | None = None, seed: int = 0) -> None:
        super().__init__(at, strength, length, seed)


def param_groups(trainer: Trainer) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def optimizer_classes(trainer: Trainer) -> list[str]:
    """Class names of the optimizers, for an error message."""
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]
