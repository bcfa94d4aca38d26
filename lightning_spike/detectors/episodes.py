"""Episode detector: finds abnormal stretches of the losses of a run, dated to their onset."""

import math
from typing import Any, Final

from lightning_spike.codec import from_plain, to_plain
from lightning_spike.detectors.draft import Draft
from lightning_spike.detectors.overfit import OverfitDetector
from lightning_spike.detectors.periodicity import period_of
from lightning_spike.detectors.series import MAX_SEVERITY, SeriesTracker
from lightning_spike.records import Episode, EpisodeKind, Finding, Recovery, StepRow, ValidationPoint

MAX_EPISODES: Final = 200
"""Episodes that are kept; beyond, the least severe are dropped and counted; engineering choice."""
MAX_SERIES: Final = 8
"""Loss series that are judged; engineering choice."""
SAME_TROUBLE_BATCHES: Final = 24
"""Largest distance between onsets in two series that are one episode; engineering choice."""
MAX_FAMILY: Final = 64
"""Spikes among which a periodic family is searched; engineering choice."""


class EpisodeDetector:
    """Judges every loss of a run as it arrives.

    Plain numbers in, records out. Takes some fifteen microseconds per batch; memory does not grow with the run. Judges
    `"loss"` and every `"loss/<name>"`. Trouble in several series is one episode, of the series that showed it first
    (`"loss"` at the same batch).
    """

    def __init__(self) -> None:
        """Start at the beginning of a run."""
        self._series: dict[str, SeriesTracker] = {}
        self._drafts: list[Draft] = []
        self._next_id = 1
        self.dropped = 0
        """Number of episodes dropped beyond 200."""
        self._overfit: dict[str, OverfitDetector] = {}
        self._findings: list[Finding] = []

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Newest versions of the episodes so far, in order of onset; of more than 200 the most severe."""
        drafts = sorted(self._drafts, key=lambda draft: (draft.onset.ordinal, draft.id))
        return tuple(draft.record() for draft in drafts)

    @property
    def healthy(self) -> bool:
        """Whether nothing but a stall is open in any series and the last losses were accepted."""
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
            if (series := self._tracker(signal)) is not None:
                changed += series.observe(row.at, float(value), noise, row.batch_size)
        return self._report(changed) if changed else []

    def _tracker(self, signal: str) -> SeriesTracker | None:
        """The tracker of a series; `None` where there are too many."""
        if signal not in self._series and len(self._series) < MAX_SERIES:
            self._series[signal] = SeriesTracker(signal)
        return self._series.get(signal)

    def observe_validation(self, point: ValidationPoint) -> list[Episode]:
        """Judge one validation result for overfitting and, in a run without training loss, for everything else."""
        changed: list[Draft] = []
        has_training_loss = any(name == "loss" or name.startswith("loss/") for name in self._series)
        if not has_training_loss and (series := self._tracker(point.metric)) is not None:
            changed += series.observe(point.at, point.value, 1.0)
        if point.metric in self._overfit or len(self._overfit) < MAX_SERIES:
            detector = self._overfit.setdefault(point.metric, OverfitDetector())
            self._findings += detector.observe(point)
            changed += self._note_overfit(detector, point)
        return self._report(changed)

    def new_findings(self) -> list[Finding]:
        """Findings of the validations since the last call; see `OverfitDetector`."""
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
                loss_before=detector.best_value,
                loss_peak=point.value,
                signal=point.metric,
                severity=0.0,
            )
        draft.worsen(point.at, point.value, min(detector.rise, MAX_SEVERITY))
        return [draft]

    def finish(self) -> list[Episode]:
        """Close what is open at the end of the run; returns what changed."""
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
        """Whether another series has shown this trouble already; marks the draft then."""
        for other in self._drafts:
            near = abs(other.onset.ordinal - draft.onset.ordinal) <= SAME_TROUBLE_BATCHES
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
        if len(self._drafts) > MAX_EPISODES:
            closed = [kept for kept in self._drafts if not self._is_open(kept) and kept is not draft]
            self._drafts.remove(min(closed, key=lambda kept: kept.severity))
            self.dropped += 1

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
        like = [other for other in self._drafts if other.kind is draft.kind and other.signal == draft.signal][
            -MAX_FAMILY:
        ]
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
            "drafts": to_plain(self._drafts),
            "next_id": self._next_id,
            "dropped": self.dropped,
            "overfit": {name: detector.state_dict() for name, detector in self._overfit.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._drafts = [from_plain(Draft, draft) for draft in state["drafts"]]
        self._next_id, self.dropped = state["next_id"], state["dropped"]
        self._series = {name: SeriesTracker(name) for name in state["series"]}
        self._overfit = {name: OverfitDetector() for name in state["overfit"]}
        kept = {draft.id: draft for draft in self._drafts}
        for name, series in self._series.items():
            series.load_state_dict(state["series"][name])
            series.draft = series.draft and kept.get(series.draft.id, series.draft)
            series.stall_draft = series.stall_draft and kept.get(series.stall_draft.id, series.stall_draft)
        for name, detector in self._overfit.items():
            detector.load_state_dict(state["overfit"][name])
