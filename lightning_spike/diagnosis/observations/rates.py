"""Events of the learning rate near an episode, with the rates before and after them."""

import dataclasses
import math
from typing import Final

import numpy as np

from lightning_spike.diagnosis.batch_ranges import GUARD, NEAR, REACH
from lightning_spike.diagnosis.observations.loss_rise import Shown, rise_after
from lightning_spike.diagnosis.observations.step_length import lengthened
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Finding, Moment
from lightning_spike.store import TrainerStateStore

SCHEDULED: Final = ("restart", "cyclic_peak")
"""Kinds of finding of a rate that rises again because its schedule says so."""
PERIODIC: Final = frozenset({"CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"})
"""Schedulers of torch whose rate rises again by design."""
SIMILAR_PEAKS: Final = 2.0
"""Factor between the heights of two peaks of one cycle; decaying ones halve at most (Smith 2017, triangular2)."""
JUMPS: Final = ("unexplained_jump", "nonfinite")
"""Kinds of finding of a rate that rises although no schedule says so."""
LONG_REACH: Final = 4 * REACH
"""Batches before the onset in which an event still counts, as long as the rate has stayed up since;
engineering choice."""
STAYED_UP_SHARE: Final = 0.6
"""Share of its height after the event from which a rate has stayed up; engineering choice."""
CLIMBED_FACTOR: Final = 3.0
"""Factor over the run's usual rate from which a rate has climbed: a long linear warm-up is at twice its median at any
time; engineering choice."""
CLIMBING_FACTOR: Final = 1.5
"""Factor over its earlier values from which a rate is climbing; engineering choice."""
SIMILAR_RATE_SHARE: Final = 0.8
"""Share of a rate from which another rate is about as high; engineering choice."""
BATCHES_AFTERWARDS: Final = 64
"""Batches after an episode that show whether the run tolerates the rate; engineering choice."""
MIN_EVENT_FACTOR: Final = 2.0
"""Factor from which a rate that went up makes an event (science.md 2.2)."""
NEARNESS: Final = ("at once", "soon", "later", "small")
"""Levels of `event_level`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RateEvent:
    """A change of the learning rate shortly before the onset."""

    kind: str
    signal: str
    ordinal: int
    step: int
    before: float | None
    """The rate before the event: that of the update before a jump, the trough before a cyclic peak."""
    after: float
    """The highest rate from the event to the onset; NaN or Inf where the rate was not finite."""
    lag: int
    """Batches from the event to the onset. The first loss that an update at t can change is that of t + 1."""

    @property
    def factor(self) -> float | None:
        """After / before; `None` where it means nothing."""
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
    """A learning rate that rose bit by bit far above the run's usual rate."""

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
    """The rate that climbed most, without an event and after a warm-up; `None` where none climbed."""
    if not steady_rate(view):
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
    has_climbed = now >= max(CLIMBED_FACTOR * usual, float(early.max()))
    return Climb(signal=signal, usual=usual, now=now) if has_climbed else None


def start_of_climb(store: TrainerStateStore) -> Moment | None:
    """The first batch at which a rate had begun to climb (see `climbed`); `None` where none has."""
    found = (_start_of_climb(store, signal) for signal in store.history.signals if signal.startswith("lr-"))
    return min((at for at in found if at is not None), key=lambda moment: moment.ordinal, default=None)


def _start_of_climb(store: TrainerStateStore, signal: str) -> Moment | None:
    history = store.history
    known = np.flatnonzero(np.isfinite(history.series(signal)))
    rates = history.series(signal)[known]
    highest_before = np.maximum.accumulate(rates)[:-1]
    rising = np.flatnonzero(rates[1:] > highest_before) + 1
    late = (int(k) for k in rising if k >= 2 * LONG_REACH)
    above = (k for k in late if rates[k] >= CLIMBING_FACTOR * float(np.median(rates[: k - LONG_REACH])) > 0.0)
    first = next(above, None)
    return None if first is None else history.moment(int(history.ordinals[known[first]]))


def shown_after_event(store: TrainerStateStore, *kinds: str) -> Shown | None:
    """Where an event of these kinds raised the loss or made updates long, in a run without an episode.

    Only rates that go clearly higher than ever count: a rate that returns to its earlier height raises the loss for a
    while by design (Loshchilov and Hutter 2017).
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
    history, signals = store.history, [s for s in store.history.signals if s.startswith("lr-")]
    earlier = (history.before(signal, ordinal, len(history)) for signal in signals)
    later = (history.between(signal, ordinal, ordinal + GUARD) for signal in signals)
    pairs = ((before, after[np.isfinite(after)]) for before, after in zip(earlier, later, strict=True))
    return any(before.size and after.size and after.max() > CLIMBING_FACTOR * before.max() for before, after in pairs)


def rate_event(view: EpisodeView, kinds: tuple[str, ...]) -> RateEvent | None:
    """The event of these kinds that is nearest to the onset, if near enough to have caused the episode; else `None`."""
    first, last = view.onset - LONG_REACH, view.onset + _dating_error(view)
    peaks = view.findings("learning_rate", "cyclic_peak", first=first, last=view.onset + LONG_REACH)
    found = [f for f in view.findings("learning_rate", *kinds, first=first, last=last) if f.kind != "cyclic_peak"]
    found += [f for f in peaks if "cyclic_peak" in kinds and _is_periodic(view, f)]
    events = [_event(view, f) for f in found]
    near = [e for e in events if e is not None and _can_be_cause(view, e)]
    return min(near, key=lambda e: (abs(e.lag), -e.after if math.isfinite(e.after) else -math.inf), default=None)


def steady_rate(view: EpisodeView) -> bool:
    """Whether rates are known and have no event near the onset."""
    return bool(view.rate_signals) and rate_event(view, SCHEDULED + JUMPS) is None


def highest_rate_signal(view: EpisodeView) -> str | None:
    """The series with the highest learning rate just before the onset; `None` where no rates were recorded."""
    return max(view.rate_signals, key=lambda signal: view.rate(signal) or 0.0, default=None)


def event_level(view: EpisodeView, event: RateEvent) -> str:
    """The level of an event: `"small"` for a factor below 2 (science.md 2.2), else how near to the onset it was.

    Within 4 batches the event itself is the cause; a later episode may have other causes too. A slow episode is noticed
    late, so a later event still counts as `"soon"`.
    """
    if event.factor is not None and event.factor < MIN_EVENT_FACTOR:
        return "small"
    if event.lag <= NEAR:
        return "at once"
    return "soon" if event.lag <= REACH or view.dated_early else "later"


def tolerated_later(view: EpisodeView, signal: str) -> tuple[str, bool] | None:
    """Whether the loss later came down again at about the same rate, with a sentence; `None` where it is not known."""
    rate, before, history = view.rate(signal), view.episode.loss_before, view.store.history
    if rate is None or before is None or not before > 0.0:
        return None
    losses = history.series(view.episode.signal)
    is_similar = history.series(signal) >= SIMILAR_RATE_SHARE * rate
    later = losses[(history.ordinals > view.last) & is_similar & np.isfinite(losses)]
    if view.episode.end is None or later.size < BATCHES_AFTERWARDS:
        gone = view.episode.end is None and view.last - view.onset >= BATCHES_AFTERWARDS
        return ("The loss never came back under this rate.", False) if gone else None
    level = float(np.median(later[-BATCHES_AFTERWARDS:]))
    if level >= before:
        return None
    return f"Later the loss fell to {level:.3g} at about the same rate, so the rate itself is tolerable.", True


def _is_periodic(view: EpisodeView, peak: Finding) -> bool:
    """Whether a peak belongs to a cycle: a periodic schedule, or another peak of about that height."""
    if any(s.class_name in PERIODIC for s in view.facts.schedulers):
        return True
    others = view.findings("learning_rate", *SCHEDULED, first=0, last=view.onset + len(view.store.history))
    height = _height(view, peak)
    return any(SIMILAR_PEAKS * _height(view, f) >= height for f in others if f.at.ordinal != peak.at.ordinal)


def _height(view: EpisodeView, finding: Finding) -> float:
    rates = (view.at(signal, finding.at.ordinal) for signal in view.rate_signals)
    return max((rate for rate in rates if rate is not None and math.isfinite(rate)), default=0.0)


def _dating_error(view: EpisodeView) -> int:
    """Batches after the onset in which an event may still have come first.

    It is -1 where the very first loss jumped, because a loss is computed before its own update.
    """
    return view.dated_early or (1 if view.sudden is False else -1)


def _event(view: EpisodeView, found: Finding) -> RateEvent | None:
    signals = [s for s in view.rate_signals if s == f"lr-{found.detail.get('name')}"] or list(view.rate_signals)
    moved = [e for s in signals if (e := _event_in(view, found, s)) is not None]
    return max(moved, key=lambda e: e.factor or 0.0, default=None)


def _event_in(view: EpisodeView, found: Finding, signal: str) -> RateEvent | None:
    history, at = view.store.history, found.at
    since = history.between(signal, at.ordinal, max(view.onset - 1, at.ordinal))
    since = since[~np.isnan(since)] if found.kind != "nonfinite" else since
    if since.size == 0:
        return None
    earlier = history.before(signal, at.ordinal, LONG_REACH if found.kind == "cyclic_peak" else 1)
    return RateEvent(
        kind=found.kind, signal=signal, ordinal=at.ordinal, step=at.step, lag=view.onset - at.ordinal,
        before=float(earlier.min()) if earlier.size else None, after=float(since.max()),
    )  # fmt: skip


def _can_be_cause(view: EpisodeView, event: RateEvent) -> bool:
    """Whether the rate was up in the last update before the onset, or shortly before."""
    if not math.isfinite(event.after):
        return event.lag >= 0
    rate = view.rate(event.signal)
    is_up = rate is not None and rate >= STAYED_UP_SHARE * event.after
    return is_up or -GUARD <= event.lag <= (2 * REACH if view.dated_early else REACH)
