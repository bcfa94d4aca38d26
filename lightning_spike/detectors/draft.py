"""An episode while it is being written: what is known of it changes with every batch."""

import dataclasses
import math
from typing import Any

from lightning_spike.records import Episode, EpisodeKind, Moment, Recovery


def moment_state(at: Moment) -> list[int]:
    """A moment as JSON-able numbers."""
    return [at.ordinal, at.step, at.epoch, at.batch_idx]


def restored_moment(state: list[int]) -> Moment:
    """The moment that `moment_state` wrote down."""
    return Moment(ordinal=state[0], step=state[1], epoch=state[2], batch_idx=state[3])


@dataclasses.dataclass(slots=True, kw_only=True)
class Draft:
    """The mutable side of an `Episode`; `record` gives its newest frozen version."""

    kind: EpisodeKind
    onset: Moment
    noticed: Moment
    peak: Moment
    last_bad: Moment
    before: float | None
    peak_value: float
    signal: str
    severity: float
    id: int = 0
    end: Moment | None = None
    recovery: Recovery = Recovery.OPEN
    period: int | None = None
    absorbed: bool = False
    """The level it led to has been taken up as the new normal."""
    calm: int = 0
    """Accepted losses since the last abnormal one."""
    bad: int = 0
    """Abnormal losses so far."""
    starts: list[int] = dataclasses.field(default_factory=list)
    """Ordinals at which the loss left its range after having been back, at most the last 32."""

    def worsen(self, at: Moment, value: float, severity: float) -> None:
        """Take in one more abnormal loss."""
        if self.calm or not self.bad:
            self.starts = [*self.starts, at.ordinal][-32:]
        self.last_bad, self.calm, self.bad = at, 0, self.bad + 1
        self.severity = max(self.severity, severity)
        if not math.isfinite(self.peak_value):
            return
        if not math.isfinite(value) or value > self.peak_value:
            self.peak, self.peak_value = at, value

    def record(self) -> Episode:
        """The episode as it is known now."""
        return Episode(
            id=self.id,
            kind=self.kind,
            onset=self.onset,
            noticed=self.noticed,
            peak=self.peak,
            end=self.end,
            loss_before=self.before,
            loss_peak=self.peak_value,
            recovery=self.recovery,
            signal=self.signal,
            period=self.period,
            severity=self.severity,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        state: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("onset", "noticed", "peak", "last_bad"):
            state[name] = moment_state(state[name])
        state["end"] = None if self.end is None else moment_state(self.end)
        state["kind"], state["recovery"] = str(self.kind), str(self.recovery)
        state["starts"] = list(self.starts)
        return state

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Draft":
        """The draft that `state_dict` wrote down."""
        fields = dict(state)
        for name in ("onset", "noticed", "peak", "last_bad"):
            fields[name] = restored_moment(fields[name])
        fields["end"] = None if fields["end"] is None else restored_moment(fields["end"])
        fields["kind"], fields["recovery"] = EpisodeKind(fields["kind"]), Recovery(fields["recovery"])
        fields["starts"] = list(fields["starts"])
        return cls(**fields)
