"""`Report` holds the content of all renderers, so terminal, page and JSON agree; `build_report` makes it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.rank import Diagnosis, diagnose, not_replayed
from lightning_spike.experiments import Experiments, StepSizeTest
from lightning_spike.records import Action, Disabled, Episode, Finding, RunFacts, RunStatus, Verdict
from lightning_spike.store import TrainerStateStore

MAX_ERROR_CHARACTERS: Final = 300
"""Length of an error's message; the traceback has all of it."""

MIN_PROBABILITY: Final = 0.02
"""Probability below which a cause is listed as a fainter one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One recorded series."""

    name: str
    ordinals: npt.NDArray[np.int64]
    """Shape `(n,)`, ascending: the batch of each value, on the axis of `Moment.ordinal`."""
    steps: npt.NDArray[np.int64]
    """Shape `(n,)`: `global_step` of the same batches."""
    values: npt.NDArray[np.float64]
    """Shape `(n,)`; may hold NaN and ±Inf where that is what was measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """An outlier sample of a batch."""

    episode: int | None
    step: int
    position: int
    """Index in the batch."""
    dataset_index: int | None
    """Index in the dataset, `None` if unknown."""
    loss: float | None
    max_abs: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Further input of the ranking, beside signals, episodes and actions, for ranking again later."""

    facts: RunFacts
    findings: tuple[Finding, ...] = ()
    experiments: tuple[Experiments, ...] = ()
    step_size_tests: tuple[StepSizeTest, ...] = ()
    remarks: tuple[str, ...] = ()
    """Remarks of the run, without those of the ranking."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """The report of one run."""

    status: RunStatus
    error: str | None
    """Type and message of the exception that ended the run; `None` without one and for Ctrl-C."""
    steps: int
    """`trainer.global_step` at the end: optimizer steps since the very first, before a resume too."""
    batches: int
    """Training batches begun."""
    epochs: int
    """Epochs begun."""
    seconds: float
    """On the wall clock, to the millisecond."""
    device: str | None
    facts: RunFacts
    episodes: tuple[Episode, ...]
    """In order of onset."""
    causes: tuple[Verdict, ...]
    """Ranked over the run, most probable first."""
    causes_of: Mapping[int, tuple[Verdict, ...]]
    """The same, ranked for each episode by its id."""
    not_replayed: Mapping[int, str]
    """Reason by the id of an episode that could not be replayed."""
    actions: tuple[Action, ...]
    suspects: tuple[Suspect, ...]
    disabled: tuple[Disabled, ...]
    """Parts of the suite that failed and were switched off."""
    remarks: tuple[str, ...]
    """Missing observations and their reasons."""
    loss: Curve | None
    rates: tuple[Curve, ...]
    """Learning rates, one curve for each optimizer and group."""
    grad_norm: Curve | None
    validation: tuple[Curve, ...]
    recorded: Recorded | None = None
    """`None` in a report of an older version."""

    @property
    def healthy(self) -> bool:
        """Whether there is neither an episode nor a cause."""
        return not self.episodes and not self.causes

    @property
    def likely(self) -> tuple[Verdict, ...]:
        """The first cause, and those of at least `MIN_PROBABILITY`."""
        return tuple(v for i, v in enumerate(self.causes) if i == 0 or v.probability >= MIN_PROBABILITY)

    @property
    def faint(self) -> tuple[Verdict, ...]:
        """The other causes."""
        return self.causes[len(self.likely) :]

    def why_not_confirmed(self, verdict: Verdict) -> str | None:
        """The reason why no replay tested a cause, of its first such episode; `None` if one did or none was wanted."""
        if verdict.confirmed is not None:
            return None
        return next((self.not_replayed[id_] for id_ in verdict.episodes if id_ in self.not_replayed), None)

    @property
    def unexplained(self) -> float:
        """Probability of no cause of the catalogue, in [0, 1]; 0 on a healthy run."""
        return 0.0 if self.healthy else max(0.0, 1.0 - sum(v.probability for v in self.causes))


def build_report(
    store: TrainerStateStore,
    *,
    status: RunStatus,
    seconds: float,
    steps: int | None = None,
    device: str | None = None,
    error: BaseException | None = None,
) -> Report:
    """Ranks the causes and returns the report of a run.

    It reads the store only, no device value, and never blocks. If the ranking fails, the report has no causes and names
    the error in `disabled`.

    Args:
        store: The run.
        status: The run's status.
        seconds: Wall-clock time of the training.
        steps: `trainer.global_step` at the end; by default from the last recorded batch.
        device: Name of the device.
        error: The exception that ended the run.
    """
    diagnosis, broken = _diagnosed(store)
    ordinals = store.history.ordinals
    last = store.history.moment(int(ordinals[-1])) if len(ordinals) else None
    begun = (0, 0, 0) if last is None else (last.step + 1, last.ordinal + 1, last.epoch + 1)
    return Report(
        status=status,
        error=None if error is None or isinstance(error, KeyboardInterrupt) else _in_one_line(error),
        steps=begun[0] if steps is None else steps,
        batches=begun[1],
        epochs=begun[2],
        seconds=round(seconds, 3),
        device=device,
        facts=store.facts,
        episodes=store.episodes,
        causes=diagnosis.overall,
        causes_of=diagnosis.per_episode,
        not_replayed=not_replayed(store),
        actions=tuple(store.actions),
        suspects=tuple(suspects_of(store.actions)),
        disabled=(*store.disabled, *broken),
        remarks=(*store.remarks, *diagnosis.remarks),
        loss=_curve(store, "loss"),
        rates=tuple(c for s in store.history.signals if s.startswith("lr-") and (c := _curve(store, s)) is not None),
        grad_norm=_curve(store, "grad_norm"),
        validation=tuple(_validation_curves(store)),
        recorded=_recorded(store),
    )


def _recorded(store: TrainerStateStore) -> Recorded:
    return Recorded(
        facts=store.facts,
        findings=tuple(sorted(store.findings, key=_place_of)),
        experiments=tuple(store.experiments.values()),
        step_size_tests=tuple(store.step_size_tests),
        remarks=tuple(store.remarks),
    )


def _place_of(finding: Finding) -> tuple[int, str, str]:
    """By batch, then by detector: the order of the callbacks makes no difference."""
    return finding.at.ordinal, finding.detector, finding.kind


def _diagnosed(store: TrainerStateStore) -> tuple[Diagnosis, tuple[Disabled, ...]]:
    try:
        return diagnose(store), ()
    except Exception as error:  # noqa: BLE001 - the episodes are worth reading even when their ranking breaks
        return Diagnosis(), (Disabled(part="diagnosis", reason=_in_one_line(error)),)


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if len(message) > MAX_ERROR_CHARACTERS:
        message = message[: MAX_ERROR_CHARACTERS - 1] + "…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _curve(store: TrainerStateStore, signal: str) -> Curve | None:
    held = store.history.present(signal)
    if not held.any():
        return None
    columns = store.history.columns()
    return Curve(
        name=signal,
        ordinals=columns["ordinal"][held].astype(np.int64),
        steps=columns["step"][held].astype(np.int64),
        values=store.history.series(signal)[held].copy(),
    )


def _validation_curves(store: TrainerStateStore) -> Iterator[Curve]:
    for metric in dict.fromkeys(point.metric for point in store.validations):
        points = [point for point in store.validations if point.metric == metric]
        yield Curve(
            name=metric,
            ordinals=np.array([p.at.ordinal for p in points], dtype=np.int64),
            steps=np.array([p.at.step for p in points], dtype=np.int64),
            values=np.array([p.value for p in points], dtype=np.float64),
        )


def suspects_of(actions: Sequence[Action]) -> Iterator[Suspect]:
    """The outlier samples listed in the dumps, the worst first."""
    for action in actions:
        if action.action != "dump":
            continue
        listed: Sequence[Mapping[str, Any]] = action.detail.get("suspects", ())
        for sample in listed:
            yield Suspect(
                episode=action.detail.get("episode"),
                step=action.at.step,
                position=sample["position"],
                dataset_index=sample.get("dataset_index"),
                loss=sample.get("loss"),
                max_abs=sample.get("max_abs"),
            )
