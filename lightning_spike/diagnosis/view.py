"""One episode in its run: every question about it that several causes ask is answered here."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_spike.detectors.baseline import Baseline
from lightning_spike.diagnosis import judgement
from lightning_spike.diagnosis.batch_ranges import AFTERSHOCK, GUARD, MIN_ODD_RATIO, NEAR, REFERENCE
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.experiments import Experiments
from lightning_spike.records import Action, Episode, EpisodeKind, Finding, Recovery, RunFacts, number
from lightning_spike.rolling import median
from lightning_spike.store import TrainerStateStore

MIN_HEALTHY_VALUES: Final = 4
"""Healthy values without which nothing is expected of a series; engineering choice."""
ASSUMED_SPREAD: Final = 0.5
"""Assumed spread on the log scale while a baseline has too few values; engineering choice."""
ASSUMED_LIMIT: Final = 4.3
"""Limit in these spreads (4.3 sigma); together a factor of 8.6 is needed in the first batches of a run."""
MAX_LIMIT: Final = 12.0
"""Cap of the limit. A short history makes a baseline allow for any tail, which is right for raising an alarm, but here
one was raised; engineering choice."""
MAX_TRANSIENT_BATCHES: Final = 2
"""Batches that a transient episode may last, however it ended; engineering choice."""
SLOW: Final = frozenset({EpisodeKind.DIVERGENCE, EpisodeKind.OSCILLATION})
"""Kinds of episode whose onset may be dated some batches too early."""
BACK_IN_ONE_BATCH_SHARE: Final = 0.5
"""Share of the whole rise (log scale) that the last abnormal batch must have and the next must lose for a recovery in
one batch; engineering choice."""
SUDDEN_SHARE: Final = 0.5
"""Share of the whole rise (log scale) from which the first abnormal batch made a sudden rise; engineering choice."""
NO_MATCH_FACTOR: Final = 1e9
"""Factor between two values of which one is 0, or which differ in sign; engineering choice."""
CLEARLY_LOWER: Final = 0.7
"""Share of a rate below which another is clearly lower; engineering choice."""
SIMILAR_LEVEL: Final = 1.5
"""Factor over the loss before the episode up to which the loss was at about that level; engineering choice."""
SMOOTHED_LOSSES: Final = 15
"""Losses whose running median is that level; engineering choice."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """One value of a series against the recent healthy values."""

    ordinal: int
    observed: float
    expected: float
    z: float
    """Robust standard deviations above (+) or below (-) the expected value, on the log scale; infinite for a value that
    is not finite."""
    limit: float
    """The |z| above which a value is not noise."""
    ratio: float
    """Factor between observed and expected, at least 1; infinite where the value is not finite."""

    @property
    def above(self) -> bool:
        """Whether the value is too high to be noise."""
        return self.z > self.limit and self.ratio >= MIN_ODD_RATIO

    @property
    def odd(self) -> bool:
        """Whether the value is too high or too low to be noise."""
        return abs(self.z) > self.limit and self.ratio >= MIN_ODD_RATIO


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """A statistic of a batch outside the range of the batches before."""

    leaf: str
    statistic: str
    excess: Excess

    @property
    def signal(self) -> str:
        """The name of its series."""
        return f"batch/{self.leaf}/{self.statistic}"


class EpisodeView:
    """One episode of a run, with everything in the store that concerns it.

    The loss of batch t is computed before update t. So a bad batch shows in its own loss, at the onset or one before. A
    bad update (learning rate, gradient, optimizer) at t shows in the losses from t + 1 on, so the suspects are the
    updates before the onset.

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
        """The result of a function of this view, computed at the first call only."""
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
        """Ordinal of the last abnormal batch; of the newest batch while the loss has not recovered."""
        if self.episode.end is not None:
            return self.episode.end.ordinal
        ordinals = self.store.history.ordinals
        newest = int(ordinals[-1]) if ordinals.size else self.onset
        return max(newest, self.onset)

    @property
    def suspect_batches(self) -> tuple[int, ...]:
        """Ordinals of the batches that may be the bad one: the onset, and the peak where it is the very next batch.

        A high but ordinary loss just before the peak may have been taken for the onset.
        """
        peak = self.episode.peak.ordinal
        return (self.onset, peak) if peak == self.onset + 1 else (self.onset,)

    @property
    def dated_early(self) -> int:
        """Batches by which the onset may be dated too early: a slow rise is dated back to where it may have begun."""
        return GUARD if self.kind in SLOW else 0

    def step_of(self, ordinal: int) -> int:
        """`global_step` at a batch; that of the onset where the history no longer holds the batch."""
        moment = self.store.history.moment(ordinal)
        return self.step if moment is None else moment.step

    @property
    def kind(self) -> EpisodeKind:
        """The kind of the episode."""
        return self.episode.kind

    @property
    def jump(self) -> float | None:
        """Highest loss over the loss before; `None` where either is missing, not finite or not positive."""
        before, peak = self.episode.loss_before, self.episode.loss_peak
        if before is None or peak is None or not math.isfinite(peak) or not before > 0.0 or not math.isfinite(before):
            return None
        return peak / before

    @property
    def loss_text(self) -> str:
        """What the loss did: `"the loss went from 0.31 to 4.2"`."""
        before, peak = self.episode.loss_before, self.episode.loss_peak
        if peak is None and self.kind is EpisodeKind.STALL:
            return "the loss shows no more than that"
        if peak is None or not math.isfinite(peak):
            was = "" if before is None else f" (before: {before:.3g})"
            return f"the loss became {'NaN' if peak is None or math.isnan(peak) else 'infinite'}{was}"
        return f"the loss went to {peak:.3g}" if before is None else f"the loss went from {before:.3g} to {peak:.3g}"

    @property
    def consequence(self) -> str:
        """`", and the loss went from 0.31 to 4.2"`; empty in a run without an episode."""
        return f", and {self.loss_text}" if self.store.episodes else ""

    @property
    def transient(self) -> bool:
        """Whether the loss fully recovered at once: after one or two batches, or in one batch after several.

        Then the weights were not damaged. Damaged weights are trained back over several batches; a stretch of bad
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
        # Logarithms of each: the ratio of two losses of any size may be 0 or infinite.
        start, end = math.log(before), math.log(last)
        least = BACK_IN_ONE_BATCH_SHARE * (math.log(peak) - start)
        return end - start >= least and end - math.log(level) >= least

    @property
    def sudden(self) -> bool | None:
        """Whether the first abnormal batch made at least half of the rise, on the log scale; `None` if not known."""
        before, peak, first = self.episode.loss_before, self.episode.loss_peak, self.at_onset(self.episode.signal)
        if before is None or first is None or peak is None or not before > 0.0:
            return None
        if not math.isfinite(first):
            return True
        if not math.isfinite(peak) or not (first > 0.0 and peak > 0.0):
            return False
        start = math.log(before)
        return math.log(first) - start >= SUDDEN_SHARE * (math.log(max(peak, first)) - start)

    @functools.cached_property
    def previous(self) -> Episode | None:
        """The earlier episode that may still go on in this one: the last that ended shortly before its onset."""
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
        """Ordinal and value of the newest value up to a batch; under accumulation most batches have no update."""
        history = self.store.history
        held = np.flatnonzero(history.present(signal) & (history.ordinals <= ordinal))
        if held.size == 0:
            return None
        return int(history.ordinals[held[-1]]), float(history.series(signal)[held[-1]])

    @functools.cached_property
    def healthy(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows of the history outside every episode of the training loss; shape `(len(history),)`."""
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

        The batches just before the onset are left out where there are enough others.
        """
        history = self.store.history
        values = history.series(signal)
        fine = self.healthy & np.isfinite(values)
        early = values[fine & (history.ordinals < self.onset - GUARD)]
        if early.size < 2 * GUARD:
            early = values[fine & (history.ordinals < self.onset)]
        return early[-count:]

    def excess(self, signal: str, ordinal: int) -> Excess | None:
        """The value of one batch against healthy ones before the episode; `None` where either is missing."""
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
        """The value with the highest excess among the batches `first` to `last`; `None` without one."""
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
        """Factor of the noise of a smaller batch over that of a usual one."""
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
        """The unusual value statistics of a batch (maximum, spread, mean), the most unusual first."""
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
        """The excess of a mean with its shift in standard deviations as ratio: a mean near 0 has no useful ratio."""
        spreads = self.before(f"batch/{leaf}/std", REFERENCE)
        spread = median(spreads.tolist()) if spreads.size else 0.0
        if not spread > 0.0:
            return None
        return dataclasses.replace(excess, ratio=1.0 + abs(excess.observed - excess.expected) / spread)

    # -- learning rates ----------------------------------------------------------------------------------------------

    @property
    def rate_signals(self) -> tuple[str, ...]:
        """The learning-rate series, one per optimizer and parameter group."""
        return tuple(s for s in self.store.history.signals if s.startswith("lr-"))

    def setting(self, name: str) -> float | None:
        """A numeric hyperparameter of the first optimizer that has it, e.g. `"eps"`."""
        values = (number(group.get(name)) for o in self.facts.optimizers for group in o.groups)
        return next((value for value in values if value is not None), None)

    @property
    def beta2(self) -> float | None:
        """The decay of Adam's second moment; `None` for optimizers without one."""
        betas = (group.get("betas") for optimizer in self.facts.optimizers for group in optimizer.groups)
        second = (number(b[1]) for b in betas if isinstance(b, tuple | list) and len(b) == 2)  # noqa: PLR2004 - a pair
        return next((beta for beta in second if beta is not None), None)

    def rate(self, signal: str) -> float | None:
        """The learning rate of the last update before the onset; `None` where it is unknown or not finite."""
        held = self.latest(signal, self.onset - 1)
        return held[1] if held is not None and math.isfinite(held[1]) else None

    def tolerated_rate(self, signal: str, culprit: float) -> float | None:
        """A rate clearly below `culprit` that this run tolerated; `None` where it never used one.

        The highest rate used before the episode at about the same loss, else the rate at which the loss recovered.
        """
        before = self.highest_healthy(signal)
        if before is not None and before < CLEARLY_LOWER * culprit:
            return before
        back = self.latest(signal, self.last) if self.episode.end is not None else None
        return back[1] if back is not None and 0.0 < back[1] < CLEARLY_LOWER * culprit else None

    def highest_healthy(self, signal: str) -> float | None:
        """The highest rate used before the episode at about the loss just before it; `None` where there is none."""
        history, level = self.store.history, self.episode.loss_before
        rates, losses = history.series(signal), history.series(self.episode.signal)
        fine = self.healthy & np.isfinite(rates) & np.isfinite(losses) & (history.ordinals < self.onset - 1)
        if level is None or not level > 0.0 or fine.sum() < 2 * GUARD:
            return None
        padded = np.pad(losses[fine], SMOOTHED_LOSSES // 2, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, SMOOTHED_LOSSES)
        levels = np.median(windows, axis=1)  # type: ignore[no-untyped-call, unused-ignore]
        inside = rates[fine][levels <= SIMILAR_LEVEL * level]
        return float(inside.max()) if (inside > 0.0).any() else None

    # -- findings and experiments --------------------------------------------------------------------------------------

    def findings(self, detector: str, *kinds: str, first: int, last: int) -> tuple[Finding, ...]:
        """The findings of a detector among the batches `first` to `last`, oldest first."""
        found = (f for f in self.store.findings if f.detector == detector and f.kind in kinds)
        return tuple(f for f in found if first <= f.at.ordinal <= last)

    @functools.cached_property
    def experiments(self) -> Experiments:
        """The lab's measurements of this episode; empty where it was not examined."""
        found = self.store.experiments.get(self.episode.id)
        return Experiments(episode=self.episode.id) if found is None or found.not_run is not None else found

    @functools.cached_property
    def shares(self) -> Mapping[Group, float]:
        """Shares of the jump by group, from the experiments; empty where they give none."""
        return judgement.jump_shares(self.experiments)

    @functools.cached_property
    def split(self) -> SplitVerdict | None:
        """The verdict of the split into batch and weights.

        `None` also where the onset is within the noise but the next batch may be the bad one.
        """
        verdict = judgement.split_verdict(self.experiments)
        return None if verdict is SplitVerdict.NOISE and len(self.suspect_batches) > 1 else verdict

    @functools.cached_property
    def suspects(self) -> Finding | None:
        """The finding `suspect_samples` of this episode: the outlier samples in the batch of the onset."""
        return self._newest("suspect_samples")

    @functools.cached_property
    def bad_run(self) -> Finding | None:
        """The finding `suspect_batches` of this episode: the bad batches from the onset on, with their samples."""
        return self._newest("suspect_batches")

    def _newest(self, kind: str) -> Finding | None:
        found = (f for f in reversed(self.store.findings) if f.detector == "batch" and f.kind == kind)
        return next((f for f in found if f.detail.get("episode") == self.episode.id), None)

    @functools.cached_property
    def suspect_indices(self) -> tuple[int, ...]:
        """Dataset indices of the outlier samples, in all bad batches; of the whole batch where there are none."""
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
    """The factor between two values, at least 1 and at most `NO_MATCH_FACTOR`."""
    if observed == expected:
        return 1.0
    ratio = observed / expected if observed * expected > 0.0 else 0.0
    return min(max(ratio, 1.0 / ratio), NO_MATCH_FACTOR) if ratio > 0.0 else NO_MATCH_FACTOR
