"""The report as a record.

Everything that a renderer needs, decided once, so that terminal, page and JSON say the same.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_spike.diagnosis.rank import Diagnosis, diagnose, not_replayed
from lightning_spike.experiments import Experiments, StepSizeTest
from lightning_spike.records import Action, Disabled, Episode, Finding, Moment, RunFacts, RunStatus, Verdict
from lightning_spike.store import TrainerStateStore

ERROR_CHARACTERS: Final = 300
"""An error's message is cut here: some carry a whole configuration, and the traceback has it anyway."""

LEAST_PROBABILITY: Final = 0.02
"""Below this a cause is one in fifty, and named only where there is room."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One recorded series, as far as it is still held."""

    name: str
    ordinals: npt.NDArray[np.int64]
    """Shape `(n,)`, ascending: the batch of each value, on the axis of `Moment.ordinal`."""
    steps: npt.NDArray[np.int64]
    """Shape `(n,)`: `global_step` of the same batches."""
    values: npt.NDArray[np.float64]
    """Shape `(n,)`; may hold NaN and ±Inf where that is what was measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A sample of a batch that stands out among its neighbours."""

    episode: int | None
    step: int
    position: int
    """Index in the batch."""
    dataset_index: int | None
    """Index in the dataset, `None` where it is not known."""
    loss: float | None
    max_abs: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What the ranking reads of a run beside its signals, episodes and actions, so that it can be done again later."""

    facts: RunFacts
    findings: tuple[Finding, ...] = ()
    experiments: tuple[Experiments, ...] = ()
    step_size_tests: tuple[StepSizeTest, ...] = ()
    remarks: tuple[str, ...] = ()
    """Those of the run; the ranking adds its own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """One run, explained."""

    status: RunStatus
    error: str | None
    """Type and message of the exception that ended the run, `None` for any other end and for Ctrl-C."""
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
    """Why an episode could not be run again, by its id; those that were are not in it."""
    actions: tuple[Action, ...]
    suspects: tuple[Suspect, ...]
    disabled: tuple[Disabled, ...]
    """Parts of the suite that broke and were switched off."""
    remarks: tuple[str, ...]
    """What could not be observed, and why."""
    loss: Curve | None
    rates: tuple[Curve, ...]
    """Learning rates, one curve for each optimizer and group."""
    grad_norm: Curve | None
    validation: tuple[Curve, ...]
    recorded: Recorded | None = None
    """`None` for a report of a version that did not keep it."""

    @property
    def healthy(self) -> bool:
        """Nothing to explain: no episode and no cause."""
        return not self.episodes and not self.causes

    @property
    def likely(self) -> tuple[Verdict, ...]:
        """The causes worth a reader's time: the first, and those of at least `LEAST_PROBABILITY`."""
        return tuple(v for i, v in enumerate(self.causes) if i == 0 or v.probability >= LEAST_PROBABILITY)

    @property
    def faint(self) -> tuple[Verdict, ...]:
        """The other causes."""
        return self.causes[len(self.likely) :]

    def why_not_confirmed(self, verdict: Verdict) -> str | None:
        """Why no replay has tested a cause.

        That of its first episode which could not be run again; `None` where a replay had its say, or none was asked
        for.
        """
        if verdict.confirmed is not None:
            return None
        return next((self.not_replayed[id_] for id_ in verdict.episodes if id_ in self.not_replayed), None)

    @property
    def unexplained(self) -> float:
        """What the causes leave open, in [0, 1]; 0 on a healthy run."""
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
    """Rank the causes and put together what there is to say about a run.

    Pure but for reading the store; takes no device value and never blocks. If the ranking itself breaks, the report
    comes out without causes and names the broken part in `disabled`.

    Args:
        store: The run.
        status: How it ended.
        seconds: How long the training took, on the wall clock.
        steps: `trainer.global_step` at the end; by default worked out from the last recorded batch.
        device: The device in words, for the reader.
        error: What ended the run.
    """
    diagnosis, broken = _diagnosed(store)
    last = _last_moment(store)
    return Report(
        status=status,
        error=None if error is None or isinstance(error, KeyboardInterrupt) else _in_one_line(error),
        steps=steps if steps is not None else (last.step + 1 if last else 0),
        batches=last.ordinal + 1 if last else 0,
        epochs=last.epoch + 1 if last else 0,
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
        recorded=Recorded(
            facts=store.facts,
            findings=tuple(store.findings),
            experiments=tuple(store.experiments.values()),
            step_size_tests=tuple(store.step_size_tests),
            remarks=tuple(store.remarks),
        ),
    )


def _diagnosed(store: TrainerStateStore) -> tuple[Diagnosis, tuple[Disabled, ...]]:
    try:
        return diagnose(store), ()
    except Exception as error:  # noqa: BLE001 - the episodes are worth reading even when their ranking breaks
        return Diagnosis(), (Disabled(part="diagnosis", reason=_in_one_line(error)),)


def _last_moment(store: TrainerStateStore) -> Moment | None:
    ordinals = store.history.ordinals
    return store.history.moment(int(ordinals[-1])) if len(ordinals) else None


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if len(message) > ERROR_CHARACTERS:
        message = message[: ERROR_CHARACTERS - 1] + "…"
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
    """From the dumps, which list the samples of a batch that stand out, the worst first."""
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
