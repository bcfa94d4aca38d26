"""`Fault`: what all fault injectors have in common: when they act, how strongly, and that nothing is left behind."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Self

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import number, whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.wrapping import wrap


class Needs(StrEnum):
    """What a fault must find in a run; where it is missing, the run is refused with a `ConfigurationError`."""

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
    """What a fault's strength means, and which values make sense."""

    means: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A fault, as a benchmark labels it; does not change."""

    fault: str
    """The class."""
    cause: str | None
    """The id that it should be diagnosed as; `None` where none of the catalogue is right."""
    at: int
    """The batch that it begins at: batches begun in the whole run before, from 0."""
    strength: float
    strength_means: str
    length: int | None
    """Batches that it lasts; `None` to the end of the run."""
    seed: int
    options: Mapping[str, Any]
    """What else it was made with."""


class Fault(Callback):
    """Base of the fault injectors: a callback that makes one thing go wrong, from one batch on, for some batches.

    Add it anywhere in `Trainer(callbacks=[...])`, or under `trainer.callbacks` in a LightningCLI YAML. Before the batch
    `at` the run is bit-identical to one without it, unless `FROM_START` says otherwise; random numbers come from a
    generator of its own; and when the fit ends, however that comes about, whatever it had wrapped is put back. Strength
    and batch are parameters; `mild` and `strong` give two strengths that fit small trainings.

    A `training_step` that takes `dataloader_iter` draws its batches past all hooks, so that faults of the batch cannot
    reach it.

    A new fault is a new file in `lightning_spike/testing/faults/` with a subclass in it that sets `cause`, `SCALE`,
    `MILD` and `STRONG` and overrides `prepare` and `before_batch`.

    Args:
        at: The batch that it begins at: batches begun in the whole run before it, from 0, over epochs and resumes.
        strength: How strong; what that means stands with each fault.
        length: Batches that it lasts; `None` to the end of the run.
        seed: Of the fault's own random numbers.

    Raises:
        ConfigurationError: An argument is out of its range; at the start of a fit or at the batch: the run lacks what
            the fault `NEEDS`.
    """

    cause: ClassVar[str | None]
    """The id of the cause that it should be diagnosed as, `None` for a harmless oddity or one that no cause covers."""
    SCALE: ClassVar[Scale]
    """What `strength` means."""
    MILD: ClassVar[Mapping[str, Any]]
    """Arguments of the milder of two variants."""
    STRONG: ClassVar[Mapping[str, Any]]
    """Arguments of the stronger of two variants."""
    NEEDS: ClassVar[frozenset[Needs]] = frozenset()
    """What it must find in a run."""
    TYPICAL_ONSET: ClassVar[int] = 200
    """Batch that it strikes in a benchmark: by then the training is under way; 0 for one that is there from the
    start."""
    TYPICAL_DURATION: ClassVar[int] = 100
    """Batches after that one within which it shows."""
    FROM_START: ClassVar[bool] = False
    """It shapes the run from its first batch, so that losses before `at` differ from those of a run without it."""

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
        """The milder variant at this batch; `options` take the place of its arguments."""
        return cls(at=at, **{**cls.MILD, **options})

    @classmethod
    def strong(cls, at: int, **options: Any) -> Self:
        """The stronger variant at this batch; `options` take the place of its arguments."""
        return cls(at=at, **{**cls.STRONG, **options})

    @property
    def description(self) -> Description:
        """What it is, frozen."""
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
        """The fit is about to start: optimizers and schedulers exist.

        Check what is needed; change nothing before its time.
        """

    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        """Called before each batch that the fault lasts, before any callback sees it.

        Returns the batch or another in its place.
        """
        del trainer, module, ordinal
        return batch

    def is_on(self, trainer: Trainer) -> bool:
        """Whether the step that `trainer` stands at is one of the fault's, also where a lab runs that step again."""
        step = trainer.global_step
        return (
            self._first_step is not None
            and step >= self._first_step
            and (self._end_step is None or step < self._end_step)
        )

    def lasts(self, ordinal: int) -> bool:
        """Whether the batch with this ordinal is one of the fault's."""
        return ordinal >= self.at and (self.length is None or ordinal < self.at + self.length)

    def later(self, undo: Callable[[], None]) -> None:
        """Call this when the fit ends."""
        self._undo.append(undo)

    def refuse(self, need: Needs, given: object) -> ConfigurationError:
        """The error for a run that lacks what the fault needs."""
        return ConfigurationError.of(
            f"Trainer(callbacks=[{type(self).__name__}])",
            expected=str(need),
            given=given,
            do="This fault cannot happen here: leave it out.",
        )

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._begun, self._first_step, self._end_step = 0, None, None
        owners = [pl_module, *([datamodule] if (datamodule := _datamodule(trainer)) is not None else [])]
        for owner in owners:  # Lightning calls exactly one of the two

            def transferred(call: Callable[..., Any], batch: Any, dataloader_idx: int) -> Any:
                return self._arrived(trainer, pl_module, call(batch, dataloader_idx))

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
        if self._end_step is None and self._first_step is not None and not self.lasts(self._begun):
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
        """A resumed run goes on counting."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._begun = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("ready", 0)

    def _arrived(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        """A batch is on its device; no callback has seen it.

        Batches of a validation and those that Lightning skips are let through.
        """
        if not trainer.training or batch is None or not self.lasts(self._begun):
            return batch
        if self._first_step is None:
            self._first_step = trainer.global_step
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


def _datamodule(trainer: Trainer) -> object | None:
    found: object | None = getattr(trainer, "datamodule", None)
    return found
