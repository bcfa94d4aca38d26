"""Learning-rate changes: warm restarts, cycles, ends of warm-up, drops and unplanned jumps.

Judges the rates that the updates used, so it works with any scheduler and with none. Where the configured schedulers
are known, it compares: a jump inside a scheduler that only decays is unplanned.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from lightning_spike.detectors.draft import moment_state, restored_moment
from lightning_spike.records import Finding, Moment, SchedulerFacts
from lightning_spike.rolling import median

MIN_JUMP: Final = 1.5
"""Smallest ratio of two successive rates that is a jump; engineering choice."""
MIN_STEEPNESS: Final = 3.0
"""Smallest factor of a jump or drop over the last smooth changes, as ratios are large near zero; engineering choice."""
SMOOTH_CHANGES: Final = 3
"""Smooth changes that are remembered for that; engineering choice."""
EQUAL_TOLERANCE: Final = 1e-9
"""Relative difference below which two rates are equal; engineering choice."""
MAX_DECAYED_SHARE: Final = 0.9
"""Share of the peak below which the rate has decayed; engineering choice."""
MIN_RESTART_SHARE: Final = 0.5
"""Smallest share of the peak to which a restart returns; schedules can shrink their restarts; engineering choice."""
MIN_DECAY_CHANGES: Final = 2
"""Downward changes before a restart, or changes inside an epoch before a wrong interval; engineering choice."""
FLAT_INTERVALS: Final = 3
"""A rise ends when the rate stays for this many of its usual intervals between changes; engineering choice."""
MAX_KEPT: Final = 16
"""Restarts and intervals between changes that are remembered; engineering choice."""
RESTARTING: Final = frozenset({"CosineAnnealingWarmRestarts", "CyclicLR"})
"""Schedulers of torch whose rate jumps up by design."""
PEAK_TOLERANCE: Final = 0.01
"""Relative difference up to which a rate is a scheduler's configured peak; engineering choice."""
MONOTONE: Final = frozenset({"ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LinearLR", "MultiStepLR"}) | {
    "PolynomialLR",
    "ReduceLROnPlateau",
    "StepLR",
}
"""Schedulers of torch whose rate never jumps up, except ConstantLR at its end and a gamma above 1."""
CYCLIC: Final = frozenset({"CyclicLR", "OneCycleLR"})
LENGTHS: Final = ("T_max", "T_0", "total_iters", "total_steps", "step_size")
"""Settings of torch's schedulers that count their steps."""


@dataclasses.dataclass(slots=True)
class _Series:
    """State of one parameter group's rate, plain values only."""

    name: str
    last: list[int]
    lr: float
    seen: int = 1
    changes: int = 0
    last_change: int = 0
    """Ordinal of the last change."""
    intervals: list[int] = dataclasses.field(default_factory=list)
    """Batches between changes."""
    sizes: list[float] = dataclasses.field(default_factory=list)
    """Sizes of the last smooth changes."""
    trend: int = 0
    """+1 while rising, -1 while falling."""
    first_rise: bool = True
    """Only rises so far: a warm-up."""
    trough: float = 0.0
    peak: float = 0.0
    """Highest rate since the last restart."""
    downs: int = 0
    """Downward changes since the last peak."""
    step_ratio: float = 1.0
    """Ratio of the last change, for the expected next rate."""
    restarts: list[list[int]] = dataclasses.field(default_factory=list)
    inside_epoch: int = 0
    """Changes between two batches of one epoch."""
    jumped_from: float | None = None
    """Rate before an unexplained jump that was not undone."""
    resumed: bool = False
    reported: list[str] = dataclasses.field(default_factory=list)
    """Findings that are reported once."""

    def sized(self, size: float) -> None:
        """Note the size of a smooth change."""
        self.sizes = [*self.sizes, size][-SMOOTH_CHANGES:]


class LearningRateDetector:
    """Watches the rate of every parameter group.

    Findings (detector `"learning_rate"`). `at` is the first batch with the new rate; for peaks, the batch at the peak.
    All details have `name` (the series), `from_lr`, `to_lr`, `ratio` (to / from, `None` from zero) and `scheduler`
    (class names of the optimizer's schedulers, joined by `+`; `None` where there is none or it is unknown). Besides:

    - `"restart"`: up in one change, back toward the peak after a decay. `peak_lr`, `period` (batches since the last
      restart, `None` for the first), `period_steps` (in optimizer steps), `planned` (whether the configured scheduler
      restarts by design), `expected_lr` (by the course so far).
    - `"cyclic_peak"`: the top of a gradual rise by at least 1.5. `trough_lr`, `period` between peaks.
    - `"warmup_end"`: the end of the first rise. `trough_lr`.
    - `"unexplained_jump"`: up by more than 1.5 in one change without such a pattern, or inside schedulers that never
      rise, or, with `resumed`, a break in either direction at a resume. `expected_lr`, `peak_lr`, `resumed`.
    - `"drop"`: down to less than 1 / 1.5 in one change. `after_jump` (it undoes an unexplained jump), `expected_lr`.
    - `"wrong_interval"`: the schedule counts batches instead of epochs, or the reverse. `configured` and `observed`
      (`"epoch"` or `"step"`), `setting` and `value` (the revealing length, `None` where the changes reveal it).
    - `"nonfinite"`: NaN, Inf or negative; once per series.
    """

    def __init__(
        self,
        schedulers: Sequence[SchedulerFacts] | None = None,
        *,
        max_epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Start at the beginning of a run.

        Args:
            schedulers: As configured; `()` for none, `None` for unknown.
            max_epochs: Planned length of the run, to distinguish lengths in epochs from lengths in steps.
            steps_per_epoch: Optimizer steps in an epoch, for the same.
        """
        self._schedulers = None if schedulers is None else tuple(schedulers)
        self._max_epochs = max_epochs
        self._steps_per_epoch = steps_per_epoch
        self._series: dict[str, _Series] = {}

    def observe(self, name: str, at: Moment, lr: float) -> list[Finding]:
        """Judge the rate that one batch's update uses.

        Args:
            name: `"lr/AdamW"` or `"lr/AdamW/pg1"`; the prefix may be left out.
            at: The batch.
            lr: The rate.
        """
        series = self._series.get(name)
        if not (math.isfinite(lr) and lr >= 0.0):
            if series is None:
                series = self._series[name] = _Series(name=name, last=moment_state(at), lr=0.0, last_change=at.ordinal)
            to_lr = lr if math.isfinite(lr) else None
            return self._once(series, "nonfinite", at, lr, to_lr=to_lr, from_lr=None, ratio=None)
        if series is None:
            series = _Series(name=name, last=moment_state(at), lr=lr, last_change=at.ordinal, trough=lr, peak=lr)
            self._series[name] = series
            return self._misread_length(series, at, lr)
        findings = self._resume(series, at, lr) if series.resumed else []
        if abs(lr - series.lr) > EQUAL_TOLERANCE * max(lr, series.lr):
            findings += self._changed(series, at, lr)
        else:
            findings += self._unchanged(series, at)
        series.last, series.lr, series.seen = moment_state(at), lr, series.seen + 1
        return findings

    def _changed(self, series: _Series, at: Moment, lr: float) -> list[Finding]:
        findings = self._interval(series, at, lr)
        if lr < series.lr:
            findings += self._fall(series, at, lr)
        elif _is_abrupt(series, lr):
            findings.append(self._jump(series, at, lr))
        else:
            if series.trend < 0:
                series.trough = series.lr
            series.trend, series.peak = 1, max(series.peak, lr)
            series.sized(lr - series.lr)
        series.step_ratio = lr / series.lr if series.lr > 0.0 else 1.0
        series.intervals = [*series.intervals, at.ordinal - series.last_change][-MAX_KEPT:]
        series.changes += 1
        series.last_change = at.ordinal
        return findings

    def _jump(self, series: _Series, at: Moment, lr: float) -> Finding:
        names = self._configured(series)
        is_restart = self._restarts(series, lr)
        expected = series.lr * min(1.0, series.step_ratio)
        finding = partial(self._finding, series, at=at, lr=lr, peak_lr=series.peak, expected_lr=expected)
        series.trend, series.first_rise = 0, False
        if not is_restart:
            found = finding("unexplained_jump", resumed=False)
            series.jumped_from = series.lr
            return found
        found = finding(
            "restart", planned=None if names is None else bool(RESTARTING & set(names)), **_period(series, at)
        )
        series.peak, series.downs, series.jumped_from = lr, 0, None
        return found

    def _restarts(self, series: _Series, lr: float) -> bool:
        """Whether a jump is a restart: at a configured peak, or toward the last peak after a decay that may restart."""
        if any(abs(lr - peak) <= PEAK_TOLERANCE * peak for peak in self._planned_peaks(series)):
            return True
        decayed = series.downs >= MIN_DECAY_CHANGES and series.lr < MAX_DECAYED_SHARE * series.peak
        names = self._configured(series)
        forbidden = names is not None and not (set(names) - MONOTONE) and not self._may_step_up(series)
        in_range = MIN_RESTART_SHARE * series.peak <= lr <= series.peak * (2.0 - MAX_DECAYED_SHARE)
        return decayed and in_range and not forbidden

    def _fall(self, series: _Series, at: Moment, lr: float) -> list[Finding]:
        findings = []
        if series.trend > 0 and series.lr >= MIN_JUMP * series.trough and series.lr > 0.0:
            cyclic = not series.first_rise or bool(CYCLIC & set(self._configured(series) or ()))
            findings.append(self._top(series, cyclic=cyclic))
        after_jump = series.jumped_from is not None and lr <= MIN_JUMP * series.jumped_from
        if _is_abrupt(series, lr):
            expected = series.lr * min(1.0, series.step_ratio)
            findings.append(self._finding(series, "drop", at, lr, after_jump=after_jump, expected_lr=expected))
        elif not after_jump:
            series.sized(series.lr - lr)
        if after_jump:
            series.jumped_from = None
        else:
            series.downs += 1
        series.trend, series.first_rise = -1, False
        return findings

    def _top(self, series: _Series, *, cyclic: bool) -> Finding:
        """The finding for the highest rate of a rise, used by the batch before this one."""
        at = restored_moment(series.last)
        ratio = series.lr / series.trough if series.trough > 0.0 else None
        kind, period = ("cyclic_peak", _period(series, at)) if cyclic else ("warmup_end", {})
        series.downs = 0
        if cyclic:
            series.peak = series.lr
        trough = series.trough
        return self._finding(series, kind, at, series.lr, from_lr=trough, trough_lr=trough, ratio=ratio, **period)

    def _unchanged(self, series: _Series, at: Moment) -> list[Finding]:
        """The end of a warm-up, once the rate stays constant for long enough."""
        if not (series.trend > 0 and series.first_rise and series.intervals):
            return []
        if at.ordinal - series.last_change < FLAT_INTERVALS * max(1.0, median(series.intervals)):
            return []
        series.trend, series.first_rise = 0, False
        return [self._top(series, cyclic=False)] if series.lr >= MIN_JUMP * series.trough else []

    def _resume(self, series: _Series, at: Moment, lr: float) -> list[Finding]:
        series.resumed = False
        if series.lr <= 0.0 or 1.0 / MIN_JUMP < lr / series.lr < MIN_JUMP or self._restarts(series, lr):
            return []
        peak, expected = series.peak, series.lr
        found = self._finding(series, "unexplained_jump", at, lr, peak_lr=peak, expected_lr=expected, resumed=True)
        series.lr, series.trend = lr, 0
        return [found]

    def _interval(self, series: _Series, at: Moment, lr: float) -> list[Finding]:
        """Changes inside an epoch though every scheduler of the optimizer is configured to step once an epoch."""
        if series.last[2] == at.epoch:
            series.inside_epoch += 1
        owned = self._owned(series)
        if series.inside_epoch < MIN_DECAY_CHANGES or not owned or any(facts.interval != "epoch" for facts in owned):
            return []
        detail = {"configured": "epoch", "observed": "step", "setting": None, "value": None}
        return self._once(series, "wrong_interval", at, lr, **detail)

    def _misread_length(self, series: _Series, at: Moment, lr: float) -> list[Finding]:
        """A length that equals the number of epochs in a scheduler that counts steps, or the reverse."""
        epochs, per_epoch = self._max_epochs or 1, self._steps_per_epoch or 1
        if min(epochs, per_epoch) == 1:
            return []
        for facts in self._owned(series):
            meant = epochs if facts.interval == "step" else epochs * per_epoch
            setting = next((name for name in LENGTHS if facts.settings.get(name) == meant), None)
            if setting is not None:
                detail = {"configured": facts.interval, "observed": facts.interval, "setting": setting, "value": meant}
                return self._once(series, "wrong_interval", at, lr, **detail)
        return []

    def _once(self, series: _Series, kind: str, at: Moment, lr: float, **detail: Any) -> list[Finding]:
        if kind in series.reported:
            return []
        series.reported.append(kind)
        return [self._finding(series, kind, at, lr, **detail)]

    def _finding(self, series: _Series, kind: str, at: Moment, lr: float, **detail: Any) -> Finding:
        common = {
            "name": series.name,
            "from_lr": series.lr,
            "to_lr": lr,
            "ratio": lr / series.lr if series.lr > 0.0 else None,
            "scheduler": "+".join(self._configured(series) or ()) or None,
        }
        return Finding(detector="learning_rate", kind=kind, at=at, detail=common | detail)

    def _owned(self, series: _Series) -> list[SchedulerFacts]:
        """The optimizer's schedulers."""
        optimizer = series.name.removeprefix("lr/").split("/")[0]
        return [facts for facts in self._schedulers or () if facts.optimizer == optimizer]

    def _configured(self, series: _Series) -> list[str] | None:
        """Class names of the optimizer's schedulers; `None` where they are unknown."""
        return None if self._schedulers is None else [facts.class_name for facts in self._owned(series)]

    def _planned_peaks(self, series: _Series) -> list[float]:
        """Rates to which the optimizer's restarting schedulers return, whatever the highest rate so far."""
        owned = [facts for facts in self._owned(series) if facts.class_name in RESTARTING]
        lists = [facts.settings.get("max_lrs" if facts.class_name in CYCLIC else "base_lrs") for facts in owned]
        return [float(rate) for rates in lists if isinstance(rates, list | tuple) for rate in rates]

    def _may_step_up(self, series: _Series) -> bool:
        """Whether a decaying scheduler's settings make it step up."""
        gammas = [float(facts.settings.get("gamma") or 0.0) for facts in self._owned(series)]
        return max(gammas, default=0.0) > 1.0 or "ConstantLR" in (self._configured(series) or ())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; the configuration is not part of it."""
        return {name: dataclasses.asdict(series) for name, series in self._series.items()}

    def load_state_dict(self, state: dict[str, Any], *, resumed: bool = True) -> None:
        """Continue where `state_dict` left off.

        Args:
            state: From `state_dict`.
            resumed: Compare the next rate with the last one across the break.
        """
        self._series = {name: _Series(**{**series, "resumed": resumed}) for name, series in state.items()}


def _is_abrupt(series: _Series, lr: float) -> bool:
    """Whether a change is large, as a ratio and beside the changes before it."""
    low, high = min(lr, series.lr), max(lr, series.lr)
    if high <= MIN_JUMP * low or high - low <= MIN_STEEPNESS * max(series.sizes, default=0.0):
        return False
    if lr < series.lr:  # a geometric decay is smooth
        return series.intervals[-1:] != [1] or abs(lr / series.lr - series.step_ratio) >= 0.01 * series.step_ratio
    return series.changes > 0 or series.seen > 2  # noqa: PLR2004 - a warm-up that begins at zero is no jump


def _period(series: _Series, at: Moment) -> dict[str, Any]:
    """Distance from the last restart or peak, in batches and steps; adds this one."""
    now = [at.ordinal, at.step]
    before = series.restarts[-1] if series.restarts else None
    series.restarts = [*series.restarts, now][-MAX_KEPT:]
    if before is None:
        return {"period": None, "period_steps": None}
    return {"period": now[0] - before[0], "period_steps": now[1] - before[1]}
