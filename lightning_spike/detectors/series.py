"""Joins the detectors of one loss series into episodes: when one opens, its kind, when it ends."""

import math
from collections import deque
from itertools import islice
from typing import Any, Final

from typing_extensions import override

from lightning_spike.codec import from_plain, to_plain
from lightning_spike.detectors.draft import Draft, moment_state, restored_moment
from lightning_spike.detectors.fast import MIN_RUN_SCORE, FastDetector
from lightning_spike.detectors.onset import ramp_onset
from lightning_spike.detectors.oscillation import SwingDetector
from lightning_spike.detectors.resumable import Resumable
from lightning_spike.detectors.slow import SlowDetector
from lightning_spike.detectors.stall import StallDetector
from lightning_spike.records import EpisodeKind, Moment, Recovery
from lightning_spike.rolling import median, theil_sen

MAX_SEVERITY: Final = 99.0
"""Largest `Episode.severity`, that of a non-finite loss; engineering choice."""
MAX_LOSS: Final = 1e100
"""Finite losses are cut here, so that their squares and sums stay finite; engineering choice."""
HISTORY: Final = 1280
"""Losses kept to date an onset back, the longest window of the stall detector; engineering choice."""
BLOCK: Final = 16
"""Losses per block for the slow detectors; engineering choice."""
CALM_LOSSES: Final = 24
"""Accepted losses in a row that end an episode; two spikes 30 batches apart are two episodes; engineering choice."""
ABSORB_AFTER: Final = 32
"""Losses out of range in a row that are the new level (science.md 1.6: re-baseline after 32 rejected steps)."""
MIN_LEADING_SCORE: Final = 2.5
"""Smallest score of a loss before the first flagged one that belongs to the episode; engineering choice."""
LEADING_SHARE: Final = 0.5
"""Smallest share of the next loss's score for the same: a doubled score is a jump, which begins there;
engineering choice."""
MAX_LEADING_SCORE: Final = 12.0
"""Largest score in that comparison, so that a climb into NaN keeps its beginning; engineering choice."""
WHOLE_SHARE: Final = 0.2
"""Largest share of the rise that remains after a whole recovery (science.md 1.8)."""
PART_SHARE: Final = 0.8
"""Share of the rise from which on there is no recovery (science.md 1.8)."""
PEAK_NOISE: Final = 2.5
"""Standard deviations of the highest of some dozens of losses above their level, taken off the rise;
engineering choice."""
JUMP_BATCHES: Final = 4
"""Batches from the onset to half of the peak within which a rise is a jump; engineering choice."""


class SeriesTracker(Resumable):
    """Feeds the detectors of one series and writes the drafts of its episodes.

    In a state dict, open drafts have their ids: `EpisodeDetector` keeps the drafts themselves.
    """

    STATE = ("fast", "slow", "swing", "stall", "_pending", "_block")

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
        self.stall_draft: Draft | None = None
        """The open stall."""
        self._history: deque[tuple[Moment, float, float]] = deque(maxlen=HISTORY)
        self._pending: list[float] = []
        self._block: list[float] = []
        """Finite losses, flagged ones included, of the incomplete block."""

    def observe(self, at: Moment, value: float, noise: float, samples: int | None = None) -> list[Draft]:
        """Judge one loss; returns the drafts that it opened or changed."""
        if not math.isfinite(value):
            self._history.append((at, value, MAX_SEVERITY))
            return [self._abnormal(at, value, MAX_SEVERITY, 1)]
        if not -MAX_LOSS <= value <= MAX_LOSS:
            value = math.copysign(MAX_LOSS, value)
        score = self.fast.baseline.score(value, noise)
        self._history.append((at, value, score))
        draft = self.draft
        inside_episode = draft is not None and not draft.absorbed and draft.calm < JUMP_BATCHES
        run = self.fast.outside(value, score, samples, inside_episode=inside_episode)
        if run:
            self._pending.append(value)
            changed = [self._abnormal(at, value, min(score, MAX_SEVERITY), run)]
            if len(self._pending) >= ABSORB_AFTER:
                self._absorb(changed[0])
        else:
            self.fast.accept(value, noise, score)
            self._pending.clear()
            changed = [] if draft is None else self._calm(draft)
        self._block.append(value)
        if self.stall_draft is not None:
            self.stall_draft.last_bad = at
        return changed if len(self._block) < BLOCK else changed + self._slowly(at)

    def _slowly(self, at: Moment) -> list[Draft]:
        """Pass the last 16 losses to the detectors that work on blocks."""
        block, self._block = self._block, []
        middle = median(block)
        changed = [self._drifted(at)] if self.slow.push(block, middle) else []
        if (since := self.swing.push(block)) is not None:
            changed.append(self._swung(at, since))
        return changed + self._stalled(at, self.stall.push(block, middle))

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
            loss_before=self.fast.baseline.level,
            loss_peak=value,
            signal=self.signal,
            severity=severity,
        )

    def _first_of_run(self, at: Moment) -> Moment:
        """The first of the abnormal losses up to the newest; before a jump, a merely high one is chance."""
        first, following = at, self._history[-1][2]
        for moment, _, score in islice(reversed(self._history), 1, ABSORB_AFTER):
            if score < max(MIN_LEADING_SCORE, LEADING_SHARE * min(following, MAX_LEADING_SCORE)):
                break
            first, following = moment, score
        return first

    def _first_raised(self, run: int) -> Moment:
        """The first high one of the last losses, which are out of range only together."""
        latest = list(islice(reversed(self._history), run))
        return next(moment for moment, _, score in reversed(latest) if score >= MIN_RUN_SCORE)

    def _absorb(self, draft: Draft) -> None:
        """Make the losses that stayed out of range the new level, unless they are returning."""
        travelled = theil_sen(self._pending) * len(self._pending)
        if travelled < -0.25 * (median(self._pending) - (draft.loss_before or 0.0)):
            del self._pending[: ABSORB_AFTER // 2]
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
        """Date a slow rise back to where the level begins to climb, never after the first flagged loss."""
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
            draft.loss_before = self.slow.reference
            draft.absorbed = True
            self._redate(draft)
            draft.worsen(at, max(recent), min(self.fast.baseline.limit, MAX_SEVERITY))
        elif draft.kind is EpisodeKind.SPIKE and draft.calm == 0:
            draft.kind = EpisodeKind.DIVERGENCE
        return draft

    def _swung(self, at: Moment, since: int) -> Draft:
        onset = self._history[-1 - min(since, len(self._history) - 1)][0]
        draft = self.draft
        if draft is None:
            draft = self.draft = self._new(EpisodeKind.OSCILLATION, onset, at, self._history[-1][1], 0.0)
            draft.worsen(at, self._history[-1][1], min(self.fast.baseline.limit, MAX_SEVERITY))
        if draft.kind in {EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE}:
            draft.kind = EpisodeKind.OSCILLATION
        return draft

    def _stalled(self, at: Moment, since: int | None) -> list[Draft]:
        if self.stall_draft is not None and not self.stall.raised:
            draft, self.stall_draft = self.stall_draft, None
            draft.end, draft.recovery = draft.last_bad, Recovery.WHOLE
            return [draft]
        if since is None or self.draft is not None:
            return []
        onset, value, _ = self._history[-1 - min(since, len(self._history) - 1)]
        self.stall_draft = self._new(EpisodeKind.STALL, onset, at, value, 1.0)
        return [self.stall_draft]

    def _calm(self, draft: Draft) -> list[Draft]:
        draft.calm += 1
        if draft.calm < CALM_LOSSES or self.slow.raised or self.swing.raised:
            return []
        self._close(draft)
        return [draft]

    def _close(self, draft: Draft) -> None:
        after = median(value for _, value, _ in islice(reversed(self._history), max(1, min(draft.calm, CALM_LOSSES))))
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
        if draft.loss_before is None:
            return Recovery.WHOLE
        left = after - draft.loss_before
        if left <= max(
            0.05 * abs(draft.loss_before), min(2.0 * self.fast.baseline.spread, 0.5 * abs(draft.loss_before))
        ):
            return Recovery.WHOLE
        if not math.isfinite(draft.loss_peak):
            return Recovery.PART
        rise = draft.loss_peak - draft.loss_before - PEAK_NOISE * self.fast.baseline.spread
        share = left / rise if rise > left else 1.0
        if share < WHOLE_SHARE and not draft.absorbed:
            return Recovery.WHOLE
        return Recovery.PART if share < PART_SHARE else Recovery.NEVER

    def _jumped(self, draft: Draft) -> bool:
        """Whether the loss reached half of the peak within `JUMP_BATCHES` of the onset."""
        half = 0.5 * ((draft.loss_before or 0.0) + draft.loss_peak)
        first = draft.onset.ordinal
        return any(
            value >= half for moment, value, _ in self._history if first <= moment.ordinal < first + JUMP_BATCHES
        )

    def finish(self) -> list[Draft]:
        """Close what is open at the end of the run; returns what changed."""
        settled = []
        draft = self.draft
        if draft is not None:
            if draft.calm >= JUMP_BATCHES and not (self.slow.raised or self.swing.raised):
                self._close(draft)
            elif self._history[-1][0].ordinal - draft.onset.ordinal >= ABSORB_AFTER:
                draft.recovery = Recovery.NEVER
            self.draft = None
            settled.append(draft)
        if self.stall_draft is not None:
            self.stall_draft.recovery = Recovery.NEVER
            settled.append(self.stall_draft)
            self.stall_draft = None
        return settled

    @property
    def healthy(self) -> bool:
        """Whether nothing but a stall is open and the last loss was accepted."""
        return self.draft is None and not self._pending

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "draft": to_plain(self.draft),
            "stall_draft": to_plain(self.stall_draft),
            "history": [[*moment_state(moment), value, score] for moment, value, score in self._history],
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        drafts = [state["draft"], state["stall_draft"]]
        self.draft, self.stall_draft = (None if draft is None else from_plain(Draft, draft) for draft in drafts)
        self._history = deque(((restored_moment(row[:4]), row[4], row[5]) for row in state["history"]), maxlen=HISTORY)
