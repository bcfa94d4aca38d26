"""One episode beside all that is known about the run: the questions that causes ask, each answered in one place."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_spike.detectors.baseline import Baseline
from lightning_spike.diagnosis import judgement
from lightning_spike.diagnosis.constants import AFTERSHOCK, GUARD, MIN_ODD_RATIO, NEAR, REFERENCE
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.experiments import Experiments
from lightning_spike.records import Action, Episode, EpisodeKind, Finding, Recovery, RunFacts, number
from lightning_spike.rolling import median
from lightning_spike.store import TrainerStateStore

MIN_HEALTHY_VALUES = 4
"""Healthy values without which no expectation is stated."""
ASSUMED_SPREAD = 0.5
"""Spread on the log scale that is assumed while a baseline has too few values to know its own."""
ASSUMED_LIMIT = 4.3
"""… with the limit of normal noise; together a factor of 8.6 is needed in the first batches of a run."""
MAX_LIMIT = 12.0
"""Cap of the limit: a short history makes a baseline allow for tails of any weight, which is right for raising an alarm
but here one has been raised."""
MAX_TRANSIENT_BATCHES = 2
"""Batches that an episode may last to be called lone, however it ended."""
SLOW = frozenset({EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION})
"""Kinds of episode whose onset may be dated some batches too early."""
BACK_IN_ONE_BATCH_SHARE = 0.5
"""Share of the whole rise (log scale) that the last abnormal batch must still be up by, and lose with the next, for the
loss to have come back at one blow."""


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """How one value stands to the recent healthy ones of its series."""

    ordinal: int
    observed: float
    expected: float
    z: float
    """Robust standard deviations above (+) or below (-) what was expected, on the log scale; ±Inf for a value that is
    not finite."""
    limit: float
    """The |z| beyond which a value does not belong to the noise of this series."""
    ratio: float
    """observed / expected, as a factor of at least 1 in either direction; infinite where the value is not finite."""

    @property
    def above(self) -> bool:
        """Too high to be noise."""
        return self.z > self.limit and self.ratio >= MIN_ODD_RATIO

    @property
    def odd(self) -> bool:
        """Too high or too low to be noise."""
        return abs(self.z) > self.limit and self.ratio >= MIN_ODD_RATIO


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """A statistic of a batch that is not like those of the batches before."""

    leaf: str
    statistic: str
    excess: Excess

    @property
    def signal(self) -> str:
        """The series it was seen in."""
        return f"batch/{self.leaf}/{self.statistic}"


class EpisodeView:
    """One episode of a run, and everything in the store that bears on it.

    About time: the loss of batch t is computed before update t. So a bad batch shows in its own loss, at the onset or
    one before; a bad update (learning rate, gradient, optimizer) at t shows in the losses from t + 1 on, so the updates
    before the onset are the suspects.

    Args:
        store: The run; it is only read.
        episode: One of its episodes.
    """

    def __init__(self, store: TrainerStateStore, episode: Episode) -> None:
        self.store = store
        self.episode = episode
        self._baselines: dict[str, Baseline | None] = {}
        self._once: dict[object, Any] = {}

    def once(self, look: "Callable[[EpisodeView], T]") -> T:
        """What a function makes of this view, worked out at the first call only."""
        if look not in self._once:
            self._once[look] = look(self)
        found: T = self._once[look]
        return found

    # -- the episode -------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> RunFacts:
        """The settings of the run."""
        return self.store.facts

    @property
    def onset(self) -> int:
        """Ordinal of the first abnormal batch."""
        return self.episode.onset.ordinal

    @property
    def step(self) -> int:
        """`global_step` at the onset."""
        return self.episode.onset.step

    @property
    def last(self) -> int:
        """Ordinal of the last abnormal batch, of the newest one while the loss has not come back."""
        if self.episode.end is not None:
            return self.episode.end.ordinal
        ordinals = self.store.history.ordinals
        newest = int(ordinals[-1]) if ordinals.size else self.onset
        return max(newest, self.onset)

    @property
    def suspect_batches(self) -> tuple[int, ...]:
        """Batches that may be the one that went wrong.

        The onset, and the peak where it is the very next, for a high but ordinary loss just before it may have been
        dated the onset.
        """
        peak = self.episode.peak.ordinal
        return (self.onset, peak) if peak == self.onset + 1 else (self.onset,)

    @property
    def dated_early(self) -> int:
        """Batches by which the onset may be dated too early.

        What creeps up is dated back to where it may have begun, which is before anything is out of its range.
        """
        return GUARD if self.kind in SLOW else 0

    def step_of(self, ordinal: int) -> int:
        """`global_step` at a batch; that of the onset where the batch is not held any more."""
        moment = self.store.history.moment(ordinal)
        return self.step if moment is None else moment.step

    @property
    def window(self) -> tuple[int, int]:
        """First and last ordinal of what is looked at closely: some batches before the onset up to the peak."""
        return max(self.onset - GUARD, 0), max(self.onset, self.episode.peak.ordinal)

    @property
    def kind(self) -> EpisodeKind:
        """The shape of the trouble."""
        return self.episode.kind

    @property
    def jump(self) -> float | None:
        """Highest loss over the loss before, `None` where either is missing, not finite or not positive."""
        before, peak = self.episode.loss_before, self.episode.loss_peak
        if before is None or peak is None or not math.isfinite(peak) or not before > 0.0 or not math.isfinite(before):
            return None
        return peak / before

    @property
    def loss_text(self) -> str:
        """What the loss did, in words: `"the loss went from 0.31 to 4.2"`."""
        before, peak = self.episode.loss_before, self.episode.loss_peak
        if peak is None and self.kind is EpisodeKind.STALL:
            return "the loss shows no more than that"
        if peak is None or not math.isfinite(peak):
            was = "" if before is None else f" (before: {before:.3g})"
            return f"the loss became {'NaN' if peak is None or math.isnan(peak) else 'infinite'}{was}"
        return f"the loss went to {peak:.3g}" if before is None else f"the loss went from {before:.3g} to {peak:.3g}"

    @property
    def transient(self) -> bool:
        """The loss was out and then wholly back at once, after one or two batches or at one blow after several.

        The weights bore no lasting damage.

        Weights that a step has damaged are trained back, so their loss falls over several batches; a stretch of bad
        batches ends with the last of them.
        """
        if self.episode.end is None or self.episode.recovery is not Recovery.WHOLE:
            return False
        if self.kind not in {EpisodeKind.SPIKE, EpisodeKind.NONFINITE}:
            return False
        return self.last - self.onset < MAX_TRANSIENT_BATCHES or (self.sudden is True and self._back_in_one_batch)

    @property
    def _back_in_one_batch(self) -> bool:
        before, peak, last = self.episode.loss_before, self.episode.loss_peak, self.at(self.episode.signal, self.last)
        after = self.store.history.between(self.episode.signal, self.last + 1, self.last + NEAR)
        after = after[np.isfinite(after)]
        if before is None or peak is None or last is None or after.size == 0:
            return False
        level = median(after.tolist())
        if not (min(before, last, level) > 0.0 and math.isfinite(peak) and math.isfinite(last) and peak > before):
            return False
        start, end = (
            math.log(before),
            math.log(last),
        )  # logs apart: the ratio of two losses of any size may be 0 or infinite
        least = BACK_IN_ONE_BATCH_SHARE * (math.log(peak) - start)
        return end - start >= least and end - math.log(level) >= least

    @property
    def sudden(self) -> bool | None:
        """Whether the first abnormal batch made at least half of the whole rise, on the log scale; `None` where it cannot be told."""
        before, peak, first = self.episode.loss_before, self.episode.loss_peak, self.at_onset(self.episode.signal)
        if before is None or first is None or peak is None or not before > 0.0:
            return None
        if not math.isfinite(first):
            return True
        if not math.isfinite(peak):
            return False
        if not (first > 0.0 and peak > 0.0):
            return False
        start = math.log(before)
        return math.log(first) - start >= 0.5 * (math.log(max(peak, first)) - start)

    @functools.cached_property
    def previous(self) -> Episode | None:
        """The episode of which this one may be the rest.

        The last that ended shortly before its onset, or was still open.
        """
        earlier = [e for e in self.store.episodes if e.id != self.episode.id and e.onset.ordinal < self.onset]
        near = [e for e in earlier if e.end is None or self.onset - e.end.ordinal <= AFTERSHOCK]
        return near[-1] if near else None

    # -- series ------------------------------------------------------------------------------------------------------

    def at(self, signal: str, ordinal: int) -> float | None:
        """The value of one batch, which may be NaN or ±Inf; `None` where there is none."""
        return self.store.history.at(signal, ordinal)

    def at_onset(self, signal: str) -> float | None:
        """The value of the first abnormal batch."""
        return self.at(signal, self.onset)

    def latest(self, signal: str, ordinal: int) -> tuple[int, float] | None:
        """The newest value at or before a batch, with its ordinal; under accumulation most batches have no update."""
        history = self.store.history
        held = np.flatnonzero(history.present(signal) & (history.ordinals <= ordinal))
        if held.size == 0:
            return None
        return int(history.ordinals[held[-1]]), float(history.series(signal)[held[-1]])

    @functools.cached_property
    def healthy(self) -> npt.NDArray[np.bool_]:
        """Which rows of the history lie outside every episode of a training loss; shape `(len(history),)`."""
        ordinals = self.store.history.ordinals
        fine = np.ones(ordinals.size, dtype=bool)
        for episode in self.store.episodes:
            if episode.kind in {EpisodeKind.OVERFIT, EpisodeKind.STALL}:
                continue
            end = np.inf if episode.end is None else episode.end.ordinal
            fine &= ~((ordinals >= episode.onset.ordinal) & (ordinals <= end))
        return fine

    def before(self, signal: str, count: int) -> npt.NDArray[np.float64]:
        """The last `count` finite healthy values before the onset, oldest first.

        The few batches just before it are left out if others are there.
        """
        history = self.store.history
        values = history.series(signal)
        fine = self.healthy & np.isfinite(values)
        early = values[fine & (history.ordinals < self.onset - GUARD)]
        if early.size < 2 * GUARD:
            early = values[fine & (history.ordinals < self.onset)]
        return early[-count:]

    def excess(self, signal: str, ordinal: int) -> Excess | None:
        """How the value of one batch stands to the healthy ones before the episode; `None` where either is missing."""
        observed = self.at(signal, ordinal)
        if observed is None:
            return None
        reference = self.before(signal, REFERENCE)
        if reference.size < MIN_HEALTHY_VALUES:
            return None
        expected = median(reference[-2 * NEAR * GUARD :].tolist())
        if not math.isfinite(observed):
            return Excess(ordinal=ordinal, observed=observed, expected=expected, z=math.inf, limit=1.0, ratio=math.inf)
        z, limit = self._score(signal, observed, expected, ordinal)
        ratio = _factor(observed, expected)
        return Excess(ordinal=ordinal, observed=observed, expected=expected, z=z, limit=limit, ratio=ratio)

    def worst(self, signal: str, first: int, last: int) -> Excess | None:
        """The value with the highest excess among the batches `first` to `last`.

        The first of them where several are not finite.
        """
        found = [e for ordinal in range(max(first, 0), last + 1) if (e := self.excess(signal, ordinal)) is not None]
        return max(found, key=lambda e: e.z, default=None)

    def _score(self, signal: str, observed: float, expected: float, ordinal: int) -> tuple[float, float]:
        if signal not in self._baselines:
            self._baselines[signal] = self._make_baseline(signal)
        baseline = self._baselines[signal]
        if baseline is not None and math.isfinite(baseline.limit):
            return baseline.score(observed, self._noise(ordinal)), min(baseline.limit, MAX_LIMIT)
        factor = math.log(_factor(observed, expected))
        return math.copysign(factor / ASSUMED_SPREAD, observed - expected), ASSUMED_LIMIT

    def _make_baseline(self, signal: str) -> Baseline | None:
        baseline = Baseline()
        for value in self.before(signal, REFERENCE):
            baseline.push(float(value))
        return baseline if baseline.ready else None

    def _noise(self, ordinal: int) -> float:
        """How much noisier a short batch is than a usual one."""
        size = self.at("batch_size", ordinal)
        sizes = self.before("batch_size", REFERENCE)
        if size is None or not size > 0.0 or sizes.size == 0:
            return 1.0
        return max(1.0, math.sqrt(float(sizes.max()) / size))

    # -- the batch ---------------------------------------------------------------------------------------------------

    def leaves(self, statistic: str) -> tuple[str, ...]:
        """The floating leaves of the batch that have this statistic recorded."""
        tail = f"/{statistic}"
        names = [s for s in self.store.history.signals if s.startswith("batch/") and s.endswith(tail)]
        return tuple(name.removeprefix("batch/").removesuffix(tail) for name in names)

    @functools.cached_property
    def batch_is_known(self) -> bool:
        """Whether value statistics of the batch at the onset were recorded at all."""
        return any(self.at_onset(f"batch/{leaf}/std") is not None for leaf in self.leaves("std"))

    def oddities(self, ordinal: int) -> tuple[Oddity, ...]:
        """What is not as usual about a batch's values, the oddest first: maximum, spread, mean."""
        found = [o for leaf in self.leaves("std") for o in self._oddities(leaf, ordinal) if o.excess.odd]
        return tuple(sorted(found, key=lambda o: o.excess.ratio, reverse=True))

    def _oddities(self, leaf: str, ordinal: int) -> list[Oddity]:
        out = []
        for statistic in ("max_abs", "std", "mean"):
            excess = self.excess(f"batch/{leaf}/{statistic}", ordinal)
            if excess is None or not math.isfinite(excess.observed):
                continue
            if statistic == "mean":
                excess = self._in_spreads(leaf, excess)
            if excess is not None and (statistic != "max_abs" or excess.z > 0.0):
                out.append(Oddity(leaf=leaf, statistic=statistic, excess=excess))
        return out

    def _in_spreads(self, leaf: str, excess: Excess) -> Excess | None:
        """A mean may be near zero, so its ratio says nothing.

        Its shift is told in spreads of the values instead, 1 + shift / std.
        """
        spreads = self.before(f"batch/{leaf}/std", REFERENCE)
        spread = median(spreads.tolist()) if spreads.size else 0.0
        if not spread > 0.0:
            return None
        return dataclasses.replace(excess, ratio=1.0 + abs(excess.observed - excess.expected) / spread)

    # -- learning rates ----------------------------------------------------------------------------------------------

    @property
    def rate_signals(self) -> tuple[str, ...]:
        """The learning-rate series, one for every optimizer and parameter group."""
        return tuple(s for s in self.store.history.signals if s.startswith("lr-"))

    def setting(self, name: str) -> float | None:
        """A numeric hyperparameter of the first optimizer that has it, e.g. `"eps"`."""
        values = (number(group.get(name)) for o in self.facts.optimizers for group in o.groups)
        return next((value for value in values if value is not None), None)

    @property
    def beta2(self) -> float | None:
        """The decay of Adam's second moment; `None` for optimizers without one."""
        for optimizer in self.facts.optimizers:
            for group in optimizer.groups:
                betas = group.get("betas")
                if isinstance(betas, tuple | list) and len(betas) == 2 and number(betas[1]) is not None:  # noqa: PLR2004 - Adam's two
                    return float(betas[1])
        return None

    def rate(self, signal: str) -> float | None:
        """The learning rate of the last update before the onset."""
        held = self.latest(signal, self.onset - 1)
        return held[1] if held is not None and math.isfinite(held[1]) else None

    def bearable(self, signal: str, culprit: float) -> float | None:
        """The highest rate clearly below `culprit` at which the loss stayed in its range, at about the level it had before the episode.

        First from the batches before: those whose loss, smoothed over 15, was at most 1.5 times the one before the
        episode. Else the rate at which the loss came back. `None` where the run never used such a rate.
        """
        before = self.highest_healthy(signal)
        if before is not None and before < 0.7 * culprit:
            return before
        back = self.latest(signal, self.last) if self.episode.end is not None else None
        return back[1] if back is not None and 0.0 < back[1] < 0.7 * culprit else None

    def highest_healthy(self, signal: str) -> float | None:
        """The highest rate used before the episode while the loss was at about the level it had just before it; `None` if there is none."""
        history, level = self.store.history, self.episode.loss_before
        rates, losses = history.series(signal), history.series(self.episode.signal)
        fine = self.healthy & np.isfinite(rates) & np.isfinite(losses) & (history.ordinals < self.onset - 1)
        if level is None or not level > 0.0 or fine.sum() < 2 * GUARD:
            return None
        smooth = np.lib.stride_tricks.sliding_window_view(np.pad(losses[fine], 7, mode="edge"), 15)
        inside = rates[fine][np.median(smooth, axis=1) <= 1.5 * level]  # type: ignore[no-untyped-call, unused-ignore]
        inside = inside[inside > 0.0]
        return float(inside.max()) if inside.size else None

    # -- what others found -------------------------------------------------------------------------------------------

    def findings(self, detector: str, *kinds: str, first: int, last: int) -> tuple[Finding, ...]:
        """What a detector saw among the batches `first` to `last`, oldest first."""
        return tuple(
            f
            for f in self.store.findings
            if f.detector == detector and f.kind in kinds and first <= f.at.ordinal <= last
        )

    @functools.cached_property
    def experiments(self) -> Experiments | None:
        """What the lab measured about this episode; `None` where it was not examined."""
        found = self.store.experiments.get(self.episode.id)
        return None if found is None or found.not_run is not None else found

    @functools.cached_property
    def shares(self) -> Mapping[Group, float]:
        """Shares of the jump by group, as the experiments have them; empty where they do not tell."""
        return judgement.jump_shares(self.experiments)

    @functools.cached_property
    def split(self) -> SplitVerdict | None:
        """What the split gives the jump to.

        That the onset is within the ordinary scatter is no answer where the jump may have come with the batch after it:
        `None` then.
        """
        verdict = judgement.split_verdict(self.experiments)
        return None if verdict is SplitVerdict.NOISE and len(self.suspect_batches) > 1 else verdict

    @functools.cached_property
    def suspects(self) -> Finding | None:
        """The finding `suspect_samples` of this episode: the samples that stand out in the batch of the onset."""
        return self._newest("suspect_samples")

    @functools.cached_property
    def bad_run(self) -> Finding | None:
        """The finding `suspect_batches` of this episode.

        The batches that are bad from the onset on, with their samples.
        """
        return self._newest("suspect_batches")

    def _newest(self, kind: str) -> Finding | None:
        found = self.store.findings
        mine = [
            f for f in found if f.detector == "batch" and f.kind == kind and f.detail.get("episode") == self.episode.id
        ]
        return mine[-1] if mine else None

    @functools.cached_property
    def suspect_indices(self) -> tuple[int, ...]:
        """Dataset indices of the samples that stand out, in all batches of a bad run.

        Of the whole batch where no sample does.
        """
        lists = [found.whole_numbers("dataset_indices") for found in (self.bad_run, self.suspects) if found is not None]
        dumps = (a for a in self.store.actions if a.action == "dump" and a.detail.get("episode") == self.episode.id)
        for dump in dumps:
            lists += [_indices_of_suspects(dump), dump.whole_numbers("dataset_indices")]
        return next((indices for indices in lists if indices), ())


def _indices_of_suspects(dump: Action) -> tuple[int, ...]:
    suspects = dump.detail.get("suspects")
    listed = suspects if isinstance(suspects, list | tuple) else ()
    indices = (s.get("dataset_index") for s in listed if isinstance(s, Mapping))
    return tuple(i for i in indices if isinstance(i, int) and not isinstance(i, bool))


def _factor(observed: float, expected: float) -> float:
    """By what factor two values differ, at least 1; a billion where one of them is zero or they differ in sign."""
    if observed == expected:
        return 1.0
    if observed * expected <= 0.0:
        return 1e9
    ratio = observed / expected
    return min(max(ratio, 1.0 / ratio) if ratio > 0.0 else 1e9, 1e9)
