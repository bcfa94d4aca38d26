"""The episode detector: every kind of trouble that a loss can show, at its true onset, and quiet on a healthy run."""

import math
from typing import Any, Final

from lightning_spike.detectors.draft import Draft
from lightning_spike.detectors.overfit import OverfitDetector
from lightning_spike.detectors.periodicity import period_of
from lightning_spike.detectors.series import MOST_SEVERE, SeriesTracker
from lightning_spike.records import Episode, EpisodeKind, Finding, Recovery, StepRow, ValidationPoint

MOST_EPISODES: Final = 200
"""Episodes that are kept; of more, the least severe are let go and counted."""
MOST_SERIES: Final = 8
"""Loss series that are judged; further ones are not."""
SAME_TROUBLE: Final = 24
"""Batches between the onsets in two series within which it is one trouble."""
FAMILY: Final = 64
"""Spikes among which a family is looked for."""


class EpisodeDetector:
    """Judges every loss of a run as it arrives.

    Pure: plain numbers in, records out; some fifteen microseconds per batch; memory does not grow with the run. Judged
        is `"loss"`,
    and every `"loss/<name>"` beside it; a trouble seen in several series is one episode, of the series that showed it
    first (`"loss"` if at the same batch). A batch without a loss is passed over.
    """

    def __init__(self) -> None:
        """Start at the beginning of a run."""
        self._series: dict[str, SeriesTracker] = {}
        self._drafts: list[Draft] = []
        self._next_id = 1
        self._dropped = 0
        self._overfit: dict[str, OverfitDetector] = {}
        self._findings: list[Finding] = []

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """What is known so far, newest versions, in order of onset; of more than 200 the most severe."""
        return tuple(
            draft.record() for draft in sorted(self._drafts, key=lambda draft: (draft.onset.ordinal, draft.id))
        )

    @property
    def dropped(self) -> int:
        """Episodes that were let go because there were more than 200."""
        return self._dropped

    @property
    def healthy(self) -> bool:
        """Nothing is open in any series (a stall does not count) and the last losses were accepted."""
        return all(series.healthy for series in self._series.values())

    def observe(self, row: StepRow) -> list[Episode]:
        """Judge the losses of one batch.

        Returns:
            The episodes that this batch opened or changed, newest versions.
        """
        noise = 1.0
        if row.batch_size and row.usual_batch_size and row.batch_size < row.usual_batch_size:
            noise = math.sqrt(row.usual_batch_size / row.batch_size)
        changed: list[Draft] = []
        for signal, value in row.values.items():
            if signal != "loss" and not signal.startswith("loss/"):
                continue
            series = self._series.get(signal) or (self._tracker(signal) if self._room(signal) else None)
            if series is not None:
                changed += series.observe(row.at, float(value), noise, row.batch_size)
        return self._report(changed) if changed else []

    def _room(self, signal: str) -> bool:
        return signal in self._series or len(self._series) < MOST_SERIES

    def _tracker(self, signal: str) -> SeriesTracker:
        if signal not in self._series:
            self._series[signal] = SeriesTracker(signal)
        return self._series[signal]

    def observe_validation(self, point: ValidationPoint) -> list[Episode]:
        """Judge one validation result.

        Overfitting, and, where the run has no training loss, everything else as well.
        """
        changed: list[Draft] = []
        if not any(name == "loss" or name.startswith("loss/") for name in self._series) and self._room(point.metric):
            changed += self._tracker(point.metric).observe(point.at, point.value, 1.0)
        if point.metric not in self._overfit and len(self._overfit) < MOST_SERIES:
            self._overfit[point.metric] = OverfitDetector()
        detector = self._overfit.get(point.metric)
        if detector is not None:
            self._findings += detector.observe(point)
            changed += self._note_overfit(detector, point)
        return self._report(changed)

    def new_findings(self) -> list[Finding]:
        """What the validations since the last call have shown besides episodes; see `OverfitDetector`."""
        new, self._findings = self._findings, []
        return new

    def _note_overfit(self, detector: OverfitDetector, point: ValidationPoint) -> list[Draft]:
        """Open, continue or end the episode of an overfit."""
        draft = next(
            (d for d in self._drafts if d.kind is EpisodeKind.OVERFIT and d.signal == point.metric and d.end is None),
            None,
        )
        if not detector.overfit or detector.best is None:
            if draft is not None:
                draft.end, draft.recovery = draft.last_bad, Recovery.WHOLE
            return [] if draft is None else [draft]
        if draft is None:
            draft = Draft(
                kind=EpisodeKind.OVERFIT,
                onset=detector.best,
                noticed=point.at,
                peak=point.at,
                last_bad=point.at,
                before=detector.best_value,
                peak_value=point.value,
                signal=point.metric,
                severity=0.0,
            )
        draft.worsen(point.at, point.value, min(detector.rise, MOST_SEVERE))
        return [draft]

    def finish(self) -> list[Episode]:
        """The run has ended: settle what is open; returns what changed."""
        return self._report([draft for series in self._series.values() for draft in series.finish()])

    def _report(self, changed: list[Draft]) -> list[Episode]:
        reported: dict[int, Draft] = {}
        for draft in changed:
            if draft.id == 0 and not self._known(draft):
                self._admit(draft)
            if draft.id > 0:
                reported[draft.id] = draft
                for member in self._in_step(draft):
                    reported[member.id] = member
        return [draft.record() for draft in reported.values()]

    def _known(self, draft: Draft) -> bool:
        """Another series has shown this trouble already."""
        for other in self._drafts:
            near = abs(other.onset.ordinal - draft.onset.ordinal) <= SAME_TROUBLE
            same = not {draft.kind, other.kind} & {EpisodeKind.STALL, EpisodeKind.OVERFIT}
            if other.signal != draft.signal and same and (near or self._is_open(other)):
                draft.id = -1
                return True
        return False

    def _is_open(self, draft: Draft) -> bool:
        return any(series.draft is draft for series in self._series.values())

    def _admit(self, draft: Draft) -> None:
        draft.id = self._next_id
        self._next_id += 1
        self._drafts.append(draft)
        if len(self._drafts) > MOST_EPISODES:
            closed = [kept for kept in self._drafts if not self._is_open(kept) and kept is not draft]
            self._drafts.remove(min(closed, key=lambda kept: kept.severity))
            self._dropped += 1

    def _in_step(self, draft: Draft) -> list[Draft]:
        """Members of the family of like spikes that this draft completes."""
        if draft.kind not in {EpisodeKind.SPIKE, EpisodeKind.NONFINITE}:
            draft.period = None
            return []
        if len(draft.starts) > 2:  # noqa: PLR2004 - a train of spikes inside one episode
            draft.period = period_of(draft.starts)
            return []
        if draft.period is not None or draft.bad > 1:
            return []
        like = [other for other in self._drafts if other.kind is draft.kind and other.signal == draft.signal][-FAMILY:]
        for count in range(len(like), 2, -1):
            period = period_of([member.onset.ordinal for member in like[-count:]])
            if period is not None:
                for member in like[-count:]:
                    member.period = period
                return like[-count:]
        return []

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: dicts, lists, strings, numbers, booleans and `None` only."""
        return {
            "series": {name: series.state_dict() for name, series in self._series.items()},
            "drafts": [draft.state_dict() for draft in self._drafts],
            "next_id": self._next_id,
            "dropped": self._dropped,
            "overfit": {name: detector.state_dict() for name, detector in self._overfit.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._drafts = [Draft.restored(draft) for draft in state["drafts"]]
        self._next_id = state["next_id"]
        self._dropped = state["dropped"]
        self._series = {}
        kept = {draft.id: draft for draft in self._drafts}
        for name, series in state["series"].items():
            tracker = self._tracker(name)
            tracker.load_state_dict(series)
            if tracker.draft is not None and tracker.draft.id > 0:
                tracker.draft = kept[tracker.draft.id]
            if tracker.standing is not None and tracker.standing.id > 0:
                tracker.standing = kept.get(tracker.standing.id, tracker.standing)
        self._overfit = {}
        for name, detector in state["overfit"].items():
            self._overfit[name] = OverfitDetector()
            self._overfit[name].load_state_dict(detector)
