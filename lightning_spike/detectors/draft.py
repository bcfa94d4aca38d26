"""An episode that is still open to change."""

import dataclasses
import math

from lightning_spike.records import Episode, EpisodeKind, Moment, Recovery


def moment_state(at: Moment) -> list[int]:
    """A moment as JSON-able numbers."""
    return [at.ordinal, at.step, at.epoch, at.batch_idx]


def restored_moment(state: list[int]) -> Moment:
    """The moment that `moment_state` saved."""
    return Moment(ordinal=state[0], step=state[1], epoch=state[2], batch_idx=state[3])


@dataclasses.dataclass(slots=True, kw_only=True)
class Draft:
    """The mutable version of an `Episode`."""

    kind: EpisodeKind
    onset: Moment
    noticed: Moment
    peak: Moment
    last_bad: Moment
    loss_before: float | None
    loss_peak: float
    signal: str
    severity: float
    id: int = 0
    end: Moment | None = None
    recovery: Recovery = Recovery.OPEN
    period: int | None = None
    absorbed: bool = False
    """The level after it is the new reference."""
    calm: int = 0
    """Accepted losses since the last abnormal one."""
    bad: int = 0
    """Abnormal losses so far."""
    starts: tuple[int, ...] = ()
    """Ordinals at which the loss left its range again, at most the last 32."""

    def worsen(self, at: Moment, value: float, severity: float) -> None:
        """Add one more abnormal loss."""
        if self.calm or not self.bad:
            self.starts = (*self.starts, at.ordinal)[-32:]
        self.last_bad, self.calm, self.bad = at, 0, self.bad + 1
        self.severity = max(self.severity, severity)
        if not math.isfinite(self.loss_peak):
            return
        if not math.isfinite(value) or value > self.loss_peak:
            self.peak, self.loss_peak = at, value

    def record(self) -> Episode:
        """The newest frozen version."""
        return Episode(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Episode)})
