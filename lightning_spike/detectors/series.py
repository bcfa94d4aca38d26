"""One loss series, judged by all detectors together: when an episode opens, what it is, when it is over."""

import math
from collections import deque
from itertools import islice
from typing import Any, Final

from lightning_spike.detectors.draft import Draft, moment_state, restored_moment
from lightning_spike.detectors.fast import LEAST_RUN, FastDetector
from lightning_spike.detectors.onset import ramp_onset
from lightning_spike.detectors.oscillation import SwingDetector
from lightning_spike.detectors.slow import SlowDetector
from lightning_spike.detectors.stall import StallDetector
from lightning_spike.records import EpisodeKind, Moment, Recovery
from lightning_spike.rolling import median, theil_sen

MOST_SEVERE: Final = 99.0
"""Cap of `Episode.severity`; a loss that is not finite has it."""
LARGEST: Final = 1e100
"""Finite losses are cut here, so that squares and sums of them are finite."""
HISTORY: Final = 1280
"""Losses kept to date an onset back; spans the longest window in which a stall is seen."""
BLOCK: Final = 16
"""Losses whose median is one observation for what takes time to show."""
CALM: Final = 24
"""Accepted losses in a row after which an episode is over; two spikes 30 batches apart are two episodes."""
ABSORB: Final = 32
"""Losses outside in a row after which they are the new level (science.md 1.6: re-baseline after 32 rejected steps)."""
LEADING: Final = 2.5
"""A loss just before the first flagged one belongs to the episode if its score is above this."""
JUMP: Final = 0.5
"""… and above this share of the score that follows: on the logarithmic scale twice the score is a jump, and it began
with that batch."""
FAR: Final = 12.0
"""Score that is counted at most for that, so that a climb into NaN keeps its beginning."""
WHOLE: Final = 0.2
"""Share of the rise that may be left for the recovery to be whole (science.md 1.8)."""
PART: Final = 0.8
"""Share of the rise from which on nothing recovered (science.md 1.8)."""
NOISE_OF_PEAK: Final = 2.5
"""Standard deviations by which the highest of some dozens of losses stands above their level: taken off before the
shares."""
SHARP: Final = 4
"""Batches from the onset to half of the peak within which a rise is a jump."""


class SeriesTracker:
    """Feeds the detectors of one series and writes the drafts of its episodes."""

    def __init__(self, signal: str) -> None:
        """Start empty.

        Args:
            signal: The name of the series, for `Episode.signal`.
        """
        self.signal = signal
        self.fast = FastDetector()
        self.slow = SlowDetector()
        self.swing = SwingDetector()
        self.stall = StallDetector()
        self.draft: Draft | None = None
        self.standing: Draft | None = None
        """The open stall."""
        self._history: deque[tuple[Moment, float, float]] = deque(maxlen=HISTORY)
        self._pending: list[float] = []
        self._block: list[float] = []
        """Finite losses, flagged ones included, that wait until there are 16."""

    def observe(self, at: Moment, value: float, noise: float, samples: int | None = None) -> list[Draft]:
        """Judge one loss; returns the drafts that were opened or changed by it."""
        if not math.isfinite(value):
            self._history.append((at, value, MOST_SEVERE))
            return [self._abnormal(at, value, MOST_SEVERE, 1)]
        if not -LARGEST <= value <= LARGEST:
            value = math.copysign(LARGEST, value)
        score = self.fast.baseline.score(value, noise)
        self._history.append((at, value, score))
        draft = self.draft
        inside_episode = draft is not None and not draft.absorbed and draft.calm < SHARP
        run = self.fast.outside(value, score, samples, inside_episode=inside_episode)
        if run:
            self._pending.append(value)
            changed = [self._abnormal(at, value, min(score, MOST_SEVERE), run)]
            if len(self._pending) >= ABSORB:
                self._absorb(changed[0])
        else:
            self.fast.accept(value, noise, score)
            self._pending.clear()
            changed = [] if draft is None else self._calm(draft)
        self._block.append(value)
        if self.standing is not None:
            self.standing.last_bad = at
        return changed if len(self._block) < BLOCK else changed + self._slowly(at)

    def _slowly(self, at: Moment) -> list[Draft]:
        """Hand the last 16 losses to the detectors that look at blocks of them."""
        block, self._block = self._block, []
        middle = median(block)
        changed = []
        if self.slow.push(block, middle):
            changed.append(self._drifted(at))
        since = self.swing.push(block)
        if since is not None:
            changed.append(self._swung(at, since))
        changed += self._stalled(at, self.stall.push(block, middle))
        return changed

    def _abnormal(self, at: Moment, value: float, severity: float, run: int) -> Draft:
        draft = self.draft
        if draft is None:
            onset = self._first_of_run(at) if run == 1 else self._first_raised(run)
            kind = EpisodeKind.SPIKE if math.isfinite(value) else EpisodeKind.NONFINITE
            draft = self.draft = self._new(kind, onset, at, value, severity)
        elif not math.isfinite(value) and draft.kind is EpisodeKind.SPIKE and not draft.absorbed:
            draft.kind = EpisodeKind.NONFINITE
        draft.worsen(at, value, severity)
        return draft

    def _new(self, kind: EpisodeKind, onset: Moment, at: Moment, value: float, severity: float) -> Draft:
        return Draft(
            kind=kind,
            onset=onset,
            noticed=at,
            peak=at,
            last_bad=at,
            before=self.fast.baseline.level,
            peak_value=value,
            signal=self.signal,
            severity=severity,
        )

    def _first_of_run(self, at: Moment) -> Moment:
        """The earliest of the abnormal losses that end with the newest.

        Before a jump, one that is merely high is chance.
        """
        first, following = at, self._history[-1][2]
        for moment, _, score in islice(reversed(self._history), 1, ABSORB):
            if score < max(LEADING, JUMP * min(following, FAR)):
                break
            first, following = moment, score
        return first

    def _first_raised(self, run: int) -> Moment:
        """The first of the last losses that is high, where they only together are outside."""
        latest = list(islice(reversed(self._history), run))
        return next(moment for moment, _, score in reversed(latest) if score >= LEAST_RUN)

    def _absorb(self, draft: Draft) -> None:
        """Take the losses that stayed outside for the new level, unless they are on their way back."""
        travelled = theil_sen(self._pending) * len(self._pending)
        if travelled < -0.25 * (median(self._pending) - (draft.before or 0.0)):
            del self._pending[: ABSORB // 2]
            return
        pending, self._pending = self._pending, []
        rising = travelled > self.fast.baseline.spread
        self.fast.baseline.rebase(pending)
        if draft.kind is EpisodeKind.SPIKE:
            draft.kind = EpisodeKind.DIVERGENCE
        draft.absorbed = True
        if rising:
            self._redate(draft)

    def _redate(self, draft: Draft) -> None:
        """Date a slow rise back to where the level begins to climb.

        Never later than the first loss that was flagged.
        """
        recent = [(moment, value) for moment, value, _ in self._history if math.isfinite(value)][-256:]
        first = next((i for i, (m, _) in enumerate(recent) if m.ordinal >= draft.onset.ordinal), len(recent))
        recent = recent[max(0, first - 128) :]
        values = [value for _, value in recent]
        if min(values) > 0.0:
            values = [math.log(value) for value in values]
        onset = recent[min(ramp_onset(values) + 1, len(recent) - 1)][0]
        if onset.ordinal < draft.onset.ordinal:
            draft.onset = onset

    def _drifted(self, at: Moment) -> Draft:
        recent = [value for _, value, _ in islice(reversed(self._history), 32) if math.isfinite(value)]
        draft = self.draft
        if draft is None:
            draft = self.draft = self._new(EpisodeKind.DIVERGENCE, at, at, recent[0], 0.0)
            draft.before = self.slow.reference
            draft.absorbed = True
            self._redate(draft)
            draft.worsen(at, max(recent), min(self.fast.baseline.limit, MOST_SEVERE))
        elif draft.kind is EpisodeKind.SPIKE and draft.calm == 0:
            draft.kind = EpisodeKind.DIVERGENCE
        return draft

    def _swung(self, at: Moment, since: int) -> Draft:
        onset = self._history[-1 - min(since, len(self._history) - 1)][0]
        draft = self.draft
        if draft is None:
            draft = self.draft = self._new(EpisodeKind.OSCILLATION, onset, at, self._history[-1][1], 0.0)
            draft.worsen(at, self._history[-1][1], min(self.fast.baseline.limit, MOST_SEVERE))
        if draft.kind in {EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE}:
            draft.kind = EpisodeKind.OSCILLATION
        return draft

    def _stalled(self, at: Moment, since: int | None) -> list[Draft]:
        if self.standing is not None and not self.stall.raised:
            draft, self.standing = self.standing, None
            draft.end, draft.recovery = draft.last_bad, Recovery.WHOLE
            return [draft]
        if since is None or self.draft is not None:
            return []
        onset, value, _ = self._history[-1 - min(since, len(self._history) - 1)]
        self.standing = self._new(EpisodeKind.STALL, onset, at, value, 1.0)
        return [self.standing]

    def _calm(self, draft: Draft) -> list[Draft]:
        draft.calm += 1
        if draft.calm < CALM or self.slow.raised or self.swing.raised:
            return []
        self._close(draft)
        return [draft]

    def _close(self, draft: Draft) -> None:
        after = median(value for _, value, _ in islice(reversed(self._history), max(1, min(draft.calm, CALM))))
        draft.recovery = self._recovery(draft, after)
        draft.end = None if draft.recovery is Recovery.NEVER else draft.last_bad
        if draft.kind is EpisodeKind.SPIKE and draft.recovery is Recovery.NEVER:
            draft.kind = EpisodeKind.DIVERGENCE
        if draft.recovery is not Recovery.WHOLE:
            self.slow.rebase()
        if draft.kind is EpisodeKind.DIVERGENCE and draft.end is not None and self._jumped(draft):
            draft.kind = EpisodeKind.SPIKE
        self.draft = None

    def _recovery(self, draft: Draft, after: float) -> Recovery:
        if draft.before is None:
            return Recovery.WHOLE
        left = after - draft.before
        if left <= max(0.05 * abs(draft.before), min(2.0 * self.fast.baseline.spread, 0.5 * abs(draft.before))):
            return Recovery.WHOLE
        if not math.isfinite(draft.peak_value):
            return Recovery.PART
        rise = draft.peak_value - draft.before - NOISE_OF_PEAK * self.fast.baseline.spread
        share = left / rise if rise > left else 1.0
        if share < WHOLE and not draft.absorbed:
            return Recovery.WHOLE
        return Recovery.PART if share < PART else Recovery.NEVER

    def _jumped(self, draft: Draft) -> bool:
        half = 0.5 * ((draft.before or 0.0) + draft.peak_value)
        for moment, value, _ in self._history:
            if draft.onset.ordinal <= moment.ordinal < draft.onset.ordinal + SHARP and value >= half:
                return True
        return False

    def finish(self) -> list[Draft]:
        """The run has ended: settle what is open."""
        settled = []
        draft = self.draft
        if draft is not None:
            if draft.calm >= SHARP and not (self.slow.raised or self.swing.raised):
                self._close(draft)
            elif self._history[-1][0].ordinal - draft.onset.ordinal >= ABSORB:
                draft.recovery = Recovery.NEVER
            self.draft = None
            settled.append(draft)
        if self.standing is not None:
            self.standing.recovery = Recovery.NEVER
            settled.append(self.standing)
            self.standing = None
        return settled

    @property
    def healthy(self) -> bool:
        """Nothing is open, save a stall, and the last loss was accepted."""
        return self.draft is None and not self._pending

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; open drafts go by their id, the caller keeps them."""
        return {
            "fast": self.fast.state_dict(),
            "slow": self.slow.state_dict(),
            "swing": self.swing.state_dict(),
            "stall": self.stall.state_dict(),
            "draft": None if self.draft is None else self.draft.state_dict(),
            "standing": None if self.standing is None else self.standing.state_dict(),
            "history": [[*moment_state(moment), value, score] for moment, value, score in self._history],
            "pending": list(self._pending),
            "block": list(self._block),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self.fast.load_state_dict(state["fast"])
        self.slow.load_state_dict(state["slow"])
        self.swing.load_state_dict(state["swing"])
        self.stall.load_state_dict(state["stall"])
        self.draft = None if state["draft"] is None else Draft.restored(state["draft"])
        self.standing = None if state["standing"] is None else Draft.restored(state["standing"])
        self._history = deque(((restored_moment(row[:4]), row[4], row[5]) for row in state["history"]), maxlen=HISTORY)
        self._pending = list(state["pending"])
        self._block = list(state["block"])
