"""What was said about the runs of the diagnosis benchmark, against what was put into them."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from labelled_runs.runs import Cell, RecordedRun
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import EpisodeKind
from lightning_spike.store import TrainerStateStore

UNEXPLAINED: Final = "unexplained"
FAMILY: Final = {cause.id: cause.family.value for cause in catalogue()}
WORSE_ONCE: Final = 2.0
"""A loss this many times the highest of the clean twin from shortly before the fault on is harm …"""
WORSE_LASTING: Final = 1.3
"""… and so is a mean of the last 40 losses this many times the twin's."""
TURNED: Final = 1.3
"""Validation loss over its lowest from which a run has overfitted, whatever else is said of it."""
SMOOTH: Final = 3
BEFORE: Final = 50
LAST: Final = 40
SPIKE: Final = 3.0
"""Of the baseline: factor over the median gradient norm from which it calls a spike an explosion."""
MEASURED: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.NONFINITE})
"""Episodes with an onset that can be told to the batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One run and what was said about it."""

    cell: Cell
    harmed: bool
    """Its loss is clearly worse than that of its clean twin, of overfitting its validation loss than its own best: a
    judgement by the losses alone, none of ours."""
    ranked: tuple[tuple[str, float], ...]
    """Causes with their probabilities, first first; "unexplained" among them with what is left."""
    confirmed: bool | None
    """Of the first cause."""
    episodes: int
    overfits: bool
    """It overfits by its own validation curve."""
    onset_error: int | None
    """Batches between the first batch whose loss the fault can touch and the nearest onset of a spike; `None` without
    one."""
    first_fix: str | None

    @property
    def said(self) -> bool:
        """Something was said: an episode or a cause."""
        return self.episodes > 0 or len(self.ranked) > 1

    @property
    def counts(self) -> bool:
        """There is something to judge: it did harm, or something was said."""
        return self.harmed or self.said

    @property
    def first(self) -> str:
        """The most probable answer, "unexplained" included."""
        return max(self.ranked, key=lambda r: r[1])[0]

    @property
    def named(self) -> str:
        """The first cause; "unexplained" where none is listed."""
        return next((name for name, _ in self.ranked if name != UNEXPLAINED), UNEXPLAINED)

    def place(self, cause: str) -> int | None:
        """1 for the first cause; `None` where it is not listed."""
        names = [name for name, _ in self.ranked if name != UNEXPLAINED]
        return names.index(cause) + 1 if cause in names else None

    def probability(self, cause: str) -> float:
        """Of one answer."""
        return dict(self.ranked).get(cause, 0.0)


def judge(found: RecordedRun, twin: TrainerStateStore | None, weights: Weights | None = None) -> Judged:
    """Rank the causes of a kept run."""
    store = found.store
    if store is None:
        return Judged(
            cell=found.cell, harmed=True, ranked=((UNEXPLAINED, 1.0),), confirmed=None, episodes=0, overfits=False,
            onset_error=None, first_fix=None,
        )  # fmt: skip
    overall = diagnose(store, weights=weights).overall
    left = max(0.0, 1.0 - sum(v.probability for v in overall))
    first = overall[0] if overall else None
    return Judged(
        cell=found.cell,
        harmed=harmed(found.cell, store, twin),
        ranked=(*((v.cause, v.probability) for v in overall), (UNEXPLAINED, left)),
        confirmed=None if first is None else first.confirmed,
        episodes=len(store.episodes),
        overfits=overfits(store),
        onset_error=_onset_error(found.cell, store),
        first_fix=first.fixes[0] if first is not None and first.fixes else None,
    )


def without_lab(found: RecordedRun) -> RecordedRun:
    """The same run as if the lab had not been there."""
    if found.store is None:
        return found
    store = copy.copy(found.store)
    store.experiments, store.step_size_tests = {}, []
    return dataclasses.replace(found, store=store)


def _losses(store: TrainerStateStore) -> npt.NDArray[np.float64]:
    """By ordinal; NaN where a batch had none or none that is finite."""
    history = store.history
    values = history.series("loss")
    return np.where(np.isinf(values), np.nan, values)


def harmed(cell: Cell, store: TrainerStateStore, twin: TrainerStateStore | None, *, steps: int | None = None) -> bool:
    """Whether the loss of a run is clearly worse than that of its clean twin.

    Overfitting is judged by the validation loss: few batches have another training loss than many, which is no harm. A
    resumed run counts its batches from the resume on; its data go on as those of the twin. `steps` is the length of a
    run that was stopped before its time.
    """
    if cell.sort == "clean" or twin is None:
        return False
    if cell.causes == ("overfitting",):
        return overfits(store)
    until = cell.steps if steps is None else steps
    own, clean = _losses(store), _losses(twin)
    resumed_at = store.facts.first_step
    ours, theirs = own[cell.at - resumed_at :], clean[max(cell.at - BEFORE, 0) : until]
    if ours.size < until - cell.at or np.isnan(ours).any():
        return True
    last = slice(-LAST, None)
    once = ours.max(initial=0.0) > WORSE_ONCE * np.nanmax(theirs, initial=0.0)
    return bool(once or np.mean(ours[last]) > WORSE_LASTING * np.nanmean(theirs[last]))


def overfits(store: TrainerStateStore | None) -> bool:
    """Whether a run overfits by its own validations.

    Their last quarter lies `TURNED` times above the lowest mean of three in a row. A judgement by the curve alone, none
    of ours.
    """
    values = [] if store is None else [point.value for point in store.validations]
    if len(values) < 4 * SMOOTH:
        return False
    lowest = min(float(np.mean(values[k : k + SMOOTH])) for k in range(len(values) - SMOOTH + 1))
    return float(np.mean(values[-len(values) // 4 :])) > TURNED * lowest


def _onset_error(cell: Cell, store: TrainerStateStore) -> int | None:
    onsets = [e.onset.ordinal for e in store.episodes if e.kind in MEASURED]
    errors = [onset - cell.at for onset in onsets if abs(onset - cell.at) <= BEFORE]
    return min(errors, key=abs, default=None)


def baseline_rules() -> Mapping[str, Callable[[TrainerStateStore], str]]:
    """What others do: one guess for everything, and the rule of thumb."""
    return {"always lr_too_high": lambda _: "lr_too_high", "gradient norm spike, else bad batch": _thumb}


def _thumb(store: TrainerStateStore) -> str:
    norms, ordinals = store.history.series("grad_norm"), store.history.ordinals
    for episode in store.episodes:
        onset = episode.onset.ordinal
        near = norms[(ordinals >= onset - 8) & (ordinals <= onset)]
        before = norms[(ordinals >= onset - 128) & (ordinals < onset - 8)]
        if near.size and before.size and np.nanmax(near, initial=0.0) > SPIKE * np.nanmedian(before):
            return "gradient_explosion"
    return "bad_batch"


def calibration_error(said: Iterable[tuple[float, bool]], bins: int = 10) -> float:
    """Expected calibration error.

    By bins of equal width, the distance of mean probability and share right, weighed by size (Guo et al. 2017).
    """
    known = sorted(said)
    total = len(known)
    error = 0.0
    for _, group in itertools.groupby(known, key=lambda s: min(int(s[0] * bins), bins - 1)):
        members = list(group)
        gap = abs(sum(p for p, _ in members) / len(members) - sum(r for _, r in members) / len(members))
        error += len(members) / total * gap
    return error


def brier(judged: Sequence[Judged]) -> float:
    """Brier score (Brier 1950): mean over the runs of the summed squared errors of all answers; 0 is best, 2 worst."""
    if not judged:
        return math.nan
    total = 0.0
    for one in judged:
        truth = one.cell.causes[0] if one.cell.causes else UNEXPLAINED
        names = {name for name, _ in one.ranked} | {truth}
        total += sum((one.probability(name) - (name == truth)) ** 2 for name in names)
    return total / len(judged)
