"""Events of the learning rate that stand near an episode, with their numbers read off the series."""

import dataclasses
import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis.constants import GUARD, NEAR, REACH
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.step_length import lengthened
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Finding, Moment
from lightning_spike.store import TrainerStateStore

SCHEDULED: Final = ("restart", "cyclic_peak")
"""Kinds of finding of a rate that comes back up because its schedule says so."""
PERIODIC: Final = frozenset({"CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"})
"""Schedulers of torch whose rate goes up again by design."""
ALIKE: Final = 2.0
"""Factor between the heights of two peaks of one cycle; decaying ones halve at most (Smith 2017, triangular2)."""
JUMPS: Final = ("unexplained_jump", "nonfinite")
"""… that rises though no schedule says so."""
LONG_REACH: Final = 4 * REACH
"""Batches before the onset in which an event still counts, as long as the rate has stayed up since."""
STAYED_UP: Final = 0.6
"""Share of its height after the event at which a rate still counts as up."""
CLIMB: Final = 3.0
"""Factor over the run's usual rate so far from which a rate that rose without an event has climbed: half an order of
magnitude; a long linear warm-up is at twice its median at any time."""
BEGINS: Final = 1.5
"""… and from which it is on its way there."""
SAME: Final = 0.8
"""Share of a rate from which another is about the same."""
WELL_AFTER: Final = 64
"""Batches after the trouble that show whether a rate is borne."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RateEvent:
    """The learning rate moved, and soon after the trouble began."""

    kind: str
    signal: str
    ordinal: int
    step: int
    before: float | None
    """The rate before the event: of the update before a jump, the trough before a cyclic peak."""
    after: float
    """The highest rate from the event to the onset; NaN or Inf where the rate was not finite."""
    lag: int
    """Batches from the event to the onset; the first loss that an update at t can touch is that of t + 1."""

    @property
    def factor(self) -> float | None:
        """After / before, `None` where it means nothing."""
        if self.before is None or not self.before > 0.0 or not math.isfinite(self.after):
            return None
        return self.after / self.before

    @property
    def text(self) -> str:
        """`"lr-SGD went from 0.001 to 0.1 at step 400"`."""
        start = "" if self.before is None else f" from {self.before:.3g}"
        return f"{self.signal} went{start} to {self.after:.3g} at step {self.step}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """A learning rate that has risen bit by bit to what the run was not used to."""

    signal: str
    usual: float
    """The median rate of the run up to well before the onset."""
    now: float
    """The highest rate from there to the onset."""

    @property
    def text(self) -> str:
        """`"lr-SGD had climbed from 0.01 to 0.3"`."""
        return f"{self.signal} had climbed from {self.usual:.3g} to {self.now:.3g}"


def climbed(view: EpisodeView) -> Climb | None:
    """The rate that has climbed most, without an event and not as a warm-up does from the run's beginning; `None` where none has."""
    if not view.rate_signals or rate_event(view, SCHEDULED + JUMPS) is not None:
        return None
    found = [climb for signal in view.rate_signals if (climb := _climb(view, signal)) is not None]
    return max(found, key=lambda climb: climb.now / climb.usual, default=None)


def _climb(view: EpisodeView, signal: str) -> Climb | None:
    history = view.store.history
    early = history.before(signal, view.onset - LONG_REACH, view.onset)
    recent = history.between(signal, max(view.onset - LONG_REACH, 0), view.onset)
    recent = recent[np.isfinite(recent)]
    if early.size < LONG_REACH or recent.size == 0 or not float(np.median(early)) > 0.0:
        return None
    usual, now = float(np.median(early)), float(recent.max())
    return Climb(signal=signal, usual=usual, now=now) if now >= max(CLIMB * usual, float(early.max())) else None


def begins_to_climb(store: TrainerStateStore) -> Moment | None:
    """The first batch by which a rate has risen bit by bit to what the run was not used to (see `climbed`); `None` where none has."""
    found = [
        moment
        for signal in store.history.signals
        if signal.startswith("lr-") and (moment := _begins(store, signal)) is not None
    ]
    return min(found, key=lambda moment: moment.ordinal, default=None)


def _begins(store: TrainerStateStore, signal: str) -> Moment | None:
    history = store.history
    known = np.flatnonzero(np.isfinite(history.series(signal)))
    rates = history.series(signal)[known]
    highest_before = np.maximum.accumulate(rates)[:-1]
    rising = np.flatnonzero(rates[1:] > highest_before) + 1
    late = (int(k) for k in rising if k >= 2 * LONG_REACH)
    above = (k for k in late if rates[k] >= BEGINS * float(np.median(rates[: k - LONG_REACH])) > 0.0)
    first = next(above, None)
    return None if first is None else history.moment(int(history.ordinals[known[first]]))


def shown_after_event(store: TrainerStateStore, *kinds: str) -> Shown | None:
    """Where an event of the rate of these kinds has shown itself without an episode.

    The loss rose, or updates became long against the weights; `None` however often the rate moved without that.

    A rate that comes back to where it was before lifts the loss for a while by design (Loshchilov and Hutter 2017);
    only one that goes clearly higher than ever is asked about.
    """
    found = [f for f in store.findings if f.detector == "learning_rate" and f.kind in kinds]
    events = [f.at for f in found if _is_new_height(store, f.at.ordinal)]
    rises = [rise for at in events if (rise := rise_after(store, at.ordinal)) is not None]
    if rises:
        first = min(rises, key=lambda rise: rise.begun.ordinal)
        return Shown(at=first.begun, rise=first)
    long = [at.ordinal for at in events if lengthened(store, at.ordinal)]
    at = store.history.moment(min(long) + 1) if long else None
    return None if at is None else Shown(at=at)


def _is_new_height(store: TrainerStateStore, ordinal: int) -> bool:
    history = store.history
    for signal in (s for s in history.signals if s.startswith("lr-")):
        before, after = history.before(signal, ordinal, len(history)), history.between(signal, ordinal, ordinal + GUARD)
        after = after[np.isfinite(after)]
        if before.size and after.size and after.max() > BEGINS * before.max():
            return True
    return False


def rate_event(view: EpisodeView, kinds: tuple[str, ...]) -> RateEvent | None:
    """The event of these kinds that is nearest to the onset, `None` where none is near enough to have begun the trouble."""
    first, last = view.onset - LONG_REACH, view.onset + _dating_error(view)
    peaks = view.findings("learning_rate", "cyclic_peak", first=first, last=view.onset + LONG_REACH)
    found = [f for f in view.findings("learning_rate", *kinds, first=first, last=last) if f.kind != "cyclic_peak"]
    found += [f for f in peaks if "cyclic_peak" in kinds and _comes_back(view, f)]
    events = [_event(view, f.kind, str(f.detail.get("name")), f.at.ordinal, f.at.step) for f in found]
    near = [e for e in events if e is not None and _bears_on(view, e)]
    return min(near, key=lambda e: (abs(e.lag), -e.after if math.isfinite(e.after) else -math.inf), default=None)


def _comes_back(view: EpisodeView, peak: Finding) -> bool:
    """A single rise and fall is no cycle.

    There is a schedule that comes back by design, or the run has another peak of about that height.
    """
    if any(s.class_name in PERIODIC for s in view.facts.schedulers):
        return True
    others = view.findings("learning_rate", *SCHEDULED, first=0, last=view.onset + len(view.store.history))
    return any(ALIKE * _height(view, f) >= _height(view, peak) for f in others if f.at.ordinal != peak.at.ordinal)


def _height(view: EpisodeView, finding: Finding) -> float:
    rates = (view.at(signal, finding.at.ordinal) for signal in view.rate_signals)
    return max((rate for rate in rates if rate is not None and math.isfinite(rate)), default=0.0)


MIN_EVENT_FACTOR: Final = 2.0
"""Factor from which a rate that went up makes an event (science.md 2.2)."""
NEARNESS: Final = ("at once", "soon", "later", "small")
"""Levels of `event_level`."""


def nearness(view: EpisodeView, event: RateEvent) -> str:
    """How near to the onset an event was.

    Within 4 batches it was the cause itself, later the trouble had other chances to come about.

    A slow episode takes its time to be seen, so there a late event counts as soon.
    """
    if event.lag <= NEAR:
        return "at once"
    return "soon" if event.lag <= REACH or view.dated_early else "later"


def tolerated_later(view: EpisodeView, signal: str) -> tuple[str, bool] | None:
    """Whether the loss came down again later at about the same rate, in words; `None` where the run does not show it."""
    rate, before, history = view.rate(signal), view.episode.loss_before, view.store.history
    if rate is None or before is None or not before > 0.0:
        return None
    losses = history.series(view.episode.signal)
    later = losses[(history.ordinals > view.last) & (history.series(signal) >= SAME * rate) & np.isfinite(losses)]
    if view.episode.end is None or later.size < WELL_AFTER:
        gone = view.episode.end is None and view.last - view.onset >= WELL_AFTER
        return ("The loss never came back under this rate.", False) if gone else None
    level = float(np.median(later[-WELL_AFTER:]))
    if level >= before:
        return None
    return f"Later the loss came down to {level:.3g} at about the same rate, so the rate itself can be borne.", True


def steady_rate(view: EpisodeView) -> bool:
    """Whether rates are known, and no event of any kind stands near the onset."""
    return bool(view.rate_signals) and rate_event(view, SCHEDULED + JUMPS) is None


def _dating_error(view: EpisodeView) -> int:
    """Batches after the onset in which an event may still have come first: -1 where the very first loss has jumped, for it is computed before its update."""
    if view.dated_early:
        return view.dated_early
    return 1 if view.sudden is False else -1


def _event(view: EpisodeView, kind: str, named: str, ordinal: int, step: int) -> RateEvent | None:
    signals = [s for s in view.rate_signals if s == f"lr-{named}"] or list(view.rate_signals)
    moved = [e for s in signals if (e := _of_series(view, kind, s, ordinal, step)) is not None]
    return max(moved, key=lambda e: e.factor or 0.0, default=None)


def _of_series(view: EpisodeView, kind: str, signal: str, ordinal: int, step: int) -> RateEvent | None:
    history = view.store.history
    until = max(view.onset - 1, ordinal)
    since = history.between(signal, ordinal, until)
    since = since[~np.isnan(since)] if kind != "nonfinite" else since
    if since.size == 0:
        return None
    after = float(since.max())
    earlier = history.before(signal, ordinal, LONG_REACH if kind == "cyclic_peak" else 1)
    before = float(earlier.min()) if earlier.size else None
    return RateEvent(
        kind=kind, signal=signal, ordinal=ordinal, step=step, before=before, after=after, lag=view.onset - ordinal
    )


def _bears_on(view: EpisodeView, event: RateEvent) -> bool:
    """The rate was up in the last update before the onset, or had been shortly before.

    A rate that is not finite needs no height.
    """
    if not math.isfinite(event.after):
        return event.lag >= 0
    rate = view.rate(event.signal)
    up = rate is not None and rate >= STAYED_UP * event.after
    return up or -GUARD <= event.lag <= (2 * REACH if view.dated_early else REACH)


def event_level(view: EpisodeView, event: RateEvent) -> str:
    """How much an event of the rate tells: its nearness, or `"small"` for a factor below 2 (science.md 2.2)."""
    is_small = event.factor is not None and event.factor < MIN_EVENT_FACTOR
    return "small" if is_small else nearness(view, event)
