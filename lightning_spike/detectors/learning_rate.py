"""What the learning rate does, whoever moves it.

Warm restarts, cycles, the end of a warm-up, drops, and jumps nobody planned.

Judged by the rates that were used, batch by batch, so that it works for any scheduler and for none. Where the
configured schedulers
are known, what was seen is compared with what they do: a jump inside a scheduler that only decays is nobody's plan.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_spike.detectors.draft import moment_state, restored_moment
from lightning_spike.records import Finding, Moment, SchedulerFacts
from lightning_spike.rolling import median

JUMP: Final = 1.5
"""Ratio of two successive rates from which the move is a jump, not a slope."""
STEEPER: Final = 3.0
"""Times the last smooth moves that a jump or a drop must be: near zero a smooth schedule has large ratios but small
moves."""
SMOOTH_MOVES: Final = 3
"""Smooth moves that are remembered for that."""
SAME: Final = 1e-9
"""Relative difference below which two rates are equal."""
DECAYED: Final = 0.9
"""Share of the peak below which the rate counts as decayed."""
BACK: Final = 0.5
"""Share of the peak to which a restart must come back at least; schedules may shrink their restarts."""
LEAST_DECAY_MOVES: Final = 2
"""Downward moves without which there was no decay to restart from."""
FLAT_AFTER: Final = 3
"""A rise is over when the rate has stood for this many times its usual time between moves."""
KEPT: Final = 16
"""Restarts and times between moves that are remembered."""
RESTARTING: Final = frozenset({"CosineAnnealingWarmRestarts", "CyclicLR"})
"""Schedulers of torch whose rate jumps up by design."""
PLANNED: Final = 0.01
"""Relative difference up to which a rate is the peak that a scheduler is configured to come back to."""
MONOTONE: Final = frozenset(
    {
        "ConstantLR",
        "CosineAnnealingLR",
        "ExponentialLR",
        "LinearLR",
        "MultiStepLR",
        "PolynomialLR",
        "ReduceLROnPlateau",
        "StepLR",
    },
)
"""Schedulers of torch whose rate never jumps up, save ConstantLR at its end and a gamma above 1."""
CYCLIC: Final = frozenset({"CyclicLR", "OneCycleLR"})
LENGTHS: Final = ("T_max", "T_0", "total_iters", "total_steps", "step_size")
"""Settings of torch's schedulers that count their steps."""


@dataclasses.dataclass(slots=True)
class _Series:
    """What is remembered of one parameter group's rate; plain values only."""

    last: list[int]
    lr: float
    seen: int = 1
    moves: int = 0
    last_move: int = 0
    """Ordinal of the last change."""
    waits: list[int] = dataclasses.field(default_factory=list)
    """Batches between changes."""
    sizes: list[float] = dataclasses.field(default_factory=list)
    """Sizes of the last moves that were no jumps or drops."""
    trend: int = 0
    """+1 while rising, -1 while falling."""
    first_rise: bool = True
    """Nothing but rises so far: a warm-up."""
    trough: float = 0.0
    peak: float = 0.0
    """Highest rate since the last restart."""
    downs: int = 0
    """Downward moves since the last peak."""
    step_ratio: float = 1.0
    """Ratio of the last move, for what was due next."""
    restarts: list[list[int]] = dataclasses.field(default_factory=list)
    inside_epoch: int = 0
    """Changes between two batches of one epoch."""
    jumped_from: float | None = None
    """The rate before an unexplained jump that has not come back."""
    resumed: bool = False
    told: list[str] = dataclasses.field(default_factory=list)
    """Findings that are given once."""


class LearningRateDetector:
    """Watches every parameter group's rate.

    Findings (detector `"learning_rate"`); `at` is the first batch that used the new rate, for peaks the batch that used
    the peak.
    Detail of all: `name` (the series), `from_lr`, `to_lr`, `ratio` (to / from, `None` from zero), `scheduler` (class
    name of the optimizer's scheduler, several joined by `+`, `None` where there is none or it is not known). Besides:

    - `"restart"`: up in one move, back toward the peak after a decay. `peak_lr`, `period` (batches since the restart
      before, `None` for the first), `period_steps` (the same in optimizer steps), `planned` (`True` if the configured
      scheduler restarts by design), `expected_lr` (what the course so far led to).
    - `"cyclic_peak"`: the top of a gradual rise by at least 1.5 that now falls. `trough_lr`, `period` as above, between
      peaks.
    - `"warmup_end"`: the first rise of the run is over. `trough_lr`.
    - `"unexplained_jump"`: up by more than 1.5 in one move without such a pattern, or inside schedulers that never do
      this, or, with `resumed` true, a break in either direction across a resume. `expected_lr`, `peak_lr`, `resumed`.
    - `"drop"`: down to less than 1 / 1.5 in one move. `after_jump` (it takes an unexplained jump back), `expected_lr`.
    - `"wrong_interval"`: the schedule counts batches where epochs were meant or the reverse. `configured` and
      `observed` (`"epoch"` or `"step"`), `setting` and `value` (the length that gives it away, `None` where the moves
      do).
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
            schedulers: As configured; `()` says that there are none, `None` that it is not known.
            max_epochs: Planned length of the run, to tell lengths in epochs from lengths in steps.
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
            return self._once(
                name, series, "nonfinite", at, {"to_lr": lr if math.isfinite(lr) else None, "from_lr": None}
            )
        if series is None:
            self._series[name] = _Series(last=moment_state(at), lr=lr, last_move=at.ordinal, trough=lr, peak=lr)
            return self._misread_length(name, at, lr)
        findings = []
        if series.resumed:
            findings += self._resume(name, series, at, lr)
        if abs(lr - series.lr) > SAME * max(lr, series.lr):
            findings += self._moved(name, series, at, lr)
        else:
            findings += self._stood(name, series, at)
        series.last, series.lr, series.seen = moment_state(at), lr, series.seen + 1
        return findings

    def _moved(self, name: str, series: _Series, at: Moment, lr: float) -> list[Finding]:
        findings = self._interval(name, series, at, lr)
        up = lr > series.lr
        if up and self._abrupt(series, lr):
            findings.append(self._jump(name, series, at, lr))
        elif up:
            self._rise(series, lr)
        else:
            findings += self._fall(name, series, at, lr)
        series.step_ratio = lr / series.lr if series.lr > 0.0 else 1.0
        series.waits = [*series.waits, at.ordinal - series.last_move][-KEPT:]
        series.moves += 1
        series.last_move = at.ordinal
        return findings

    @staticmethod
    def _abrupt(series: _Series, lr: float) -> bool:
        """The move is large, as a ratio and beside the moves before it."""
        low, high = min(lr, series.lr), max(lr, series.lr)
        if high <= JUMP * low or high - low <= STEEPER * max(series.sizes, default=0.0):
            return False
        if lr < series.lr:
            geometric = series.waits[-1:] == [1] and abs(lr / series.lr - series.step_ratio) < 0.01 * series.step_ratio
            return not geometric
        return series.moves > 0 or series.seen > 2  # noqa: PLR2004 - a warm-up that begins at zero is no jump

    @staticmethod
    def _rise(series: _Series, lr: float) -> None:
        if series.trend < 0:
            series.trough = series.lr
        series.trend = 1
        series.peak = max(series.peak, lr)
        series.sizes = [*series.sizes, lr - series.lr][-SMOOTH_MOVES:]

    def _jump(self, name: str, series: _Series, at: Moment, lr: float) -> Finding:
        names = self._configured(name)
        planned = None if names is None else bool(RESTARTING & set(names))
        restarts = self._restarts(name, series, lr)
        detail = {
            **self._detail(name, series, lr),
            "peak_lr": series.peak,
            "expected_lr": series.lr * min(1.0, series.step_ratio),
        }
        series.trend, series.first_rise = 0, False
        if restarts:
            before = series.restarts[-1] if series.restarts else None
            detail["period"] = None if before is None else at.ordinal - before[0]
            detail["period_steps"] = None if before is None else at.step - before[1]
            detail["planned"] = planned
            series.restarts = [*series.restarts, [at.ordinal, at.step]][-KEPT:]
            series.peak, series.downs, series.jumped_from = lr, 0, None
            return Finding(detector="learning_rate", kind="restart", at=at, detail=detail)
        series.jumped_from = series.lr
        return Finding(detector="learning_rate", kind="unexplained_jump", at=at, detail={**detail, "resumed": False})

    def _restarts(self, name: str, series: _Series, lr: float) -> bool:
        """Back toward the peak after a decay and not inside schedulers that never do this, or at the very peak of a configured periodic one."""
        if any(abs(lr - peak) <= PLANNED * peak for peak in self._planned_peaks(name)):
            return True
        decayed = series.downs >= LEAST_DECAY_MOVES and series.lr < DECAYED * series.peak
        names = self._configured(name)
        forbidden = names is not None and not (set(names) - MONOTONE) and not self._may_step_up(name)
        return decayed and BACK * series.peak <= lr <= series.peak * (2.0 - DECAYED) and not forbidden

    def _fall(self, name: str, series: _Series, at: Moment, lr: float) -> list[Finding]:
        findings = []
        rose = series.trend > 0 and series.lr >= JUMP * series.trough and series.lr > 0.0
        if rose:
            findings.append(
                self._top(
                    name, series, cyclic=not series.first_rise or bool(CYCLIC & set(self._configured(name) or ()))
                )
            )
        after_jump = series.jumped_from is not None and lr <= JUMP * series.jumped_from
        abrupt = self._abrupt(series, lr)
        if abrupt:
            expected = series.lr * min(1.0, series.step_ratio)
            detail = {**self._detail(name, series, lr), "after_jump": after_jump, "expected_lr": expected}
            findings.append(Finding(detector="learning_rate", kind="drop", at=at, detail=detail))
        elif not after_jump:
            series.sizes = [*series.sizes, series.lr - lr][-SMOOTH_MOVES:]
        if after_jump:
            series.jumped_from = None
        else:
            series.downs += 1
        series.trend, series.first_rise = -1, False
        return findings

    def _top(self, name: str, series: _Series, *, cyclic: bool) -> Finding:
        """The batch before this one used the highest rate of a rise."""
        at = restored_moment(series.last)
        detail = {**self._detail(name, series, series.lr), "from_lr": series.trough, "trough_lr": series.trough}
        detail["ratio"] = series.lr / series.trough if series.trough > 0.0 else None
        series.downs = 0
        if not cyclic:
            return Finding(detector="learning_rate", kind="warmup_end", at=at, detail=detail)
        before = series.restarts[-1] if series.restarts else None
        detail["period"] = None if before is None else at.ordinal - before[0]
        detail["period_steps"] = None if before is None else at.step - before[1]
        series.restarts = [*series.restarts, [at.ordinal, at.step]][-KEPT:]
        series.peak = series.lr
        return Finding(detector="learning_rate", kind="cyclic_peak", at=at, detail=detail)

    def _stood(self, name: str, series: _Series, at: Moment) -> list[Finding]:
        if not (series.trend > 0 and series.first_rise and series.waits):
            return []
        if at.ordinal - series.last_move < FLAT_AFTER * max(1.0, median(series.waits)):
            return []
        series.trend, series.first_rise = 0, False
        return [self._top(name, series, cyclic=False)] if series.lr >= JUMP * series.trough else []

    def _resume(self, name: str, series: _Series, at: Moment, lr: float) -> list[Finding]:
        series.resumed = False
        if series.lr <= 0.0 or 1.0 / JUMP < lr / series.lr < JUMP or self._restarts(name, series, lr):
            return []
        detail = {**self._detail(name, series, lr), "peak_lr": series.peak, "expected_lr": series.lr, "resumed": True}
        series.lr, series.trend = lr, 0
        return [Finding(detector="learning_rate", kind="unexplained_jump", at=at, detail=detail)]

    def _interval(self, name: str, series: _Series, at: Moment, lr: float) -> list[Finding]:
        """Moves inside an epoch though every scheduler of the optimizer is configured to move once an epoch."""
        if series.last[2] == at.epoch:
            series.inside_epoch += 1
        owned = self._owned(name)
        if series.inside_epoch < LEAST_DECAY_MOVES or not owned or any(facts.interval != "epoch" for facts in owned):
            return []
        detail = {
            **self._detail(name, series, lr),
            "configured": "epoch",
            "observed": "step",
            "setting": None,
            "value": None,
        }
        return self._once(name, series, "wrong_interval", at, detail)

    def _misread_length(self, name: str, at: Moment, lr: float) -> list[Finding]:
        """A length that equals the number of epochs in a scheduler that counts steps, or the reverse."""
        epochs, per_epoch = self._max_epochs, self._steps_per_epoch
        if not epochs or epochs < 2 or not per_epoch or per_epoch < 2:  # noqa: PLR2004 - one of either cannot be mixed up
            return []
        for facts in self._owned(name):
            meant = epochs if facts.interval == "step" else epochs * per_epoch
            for setting in LENGTHS:
                if facts.settings.get(setting) == meant:
                    detail = {
                        **self._detail(name, self._series[name], lr),
                        "configured": facts.interval,
                        "observed": facts.interval,
                        "setting": setting,
                        "value": meant,
                    }
                    return self._once(name, self._series[name], "wrong_interval", at, detail)
        return []

    def _once(
        self, name: str, series: _Series | None, kind: str, at: Moment, detail: Mapping[str, Any]
    ) -> list[Finding]:
        if series is None:
            series = self._series[name] = _Series(last=moment_state(at), lr=0.0, last_move=at.ordinal)
        if kind in series.told:
            return []
        series.told.append(kind)
        full = {"name": name, "ratio": None, "scheduler": "+".join(self._configured(name) or ()) or None, **detail}
        return [Finding(detector="learning_rate", kind=kind, at=at, detail=full)]

    def _detail(self, name: str, series: _Series, lr: float) -> dict[str, Any]:
        return {
            "name": name,
            "from_lr": series.lr,
            "to_lr": lr,
            "ratio": lr / series.lr if series.lr > 0.0 else None,
            "scheduler": "+".join(self._configured(name) or ()) or None,
        }

    def _owned(self, name: str) -> list[SchedulerFacts]:
        optimizer = name.removeprefix("lr/").split("/")[0]
        return [facts for facts in self._schedulers or () if facts.optimizer == optimizer]

    def _configured(self, name: str) -> list[str] | None:
        """Class names of the optimizer's schedulers; `None` where it is not known which there are."""
        return None if self._schedulers is None else [facts.class_name for facts in self._owned(name)]

    def _planned_peaks(self, name: str) -> list[float]:
        """The rates that the optimizer's restarting schedulers come back to, however low the run has been so far (a first cycle cut short, a resume)."""
        owned = [facts for facts in self._owned(name) if facts.class_name in RESTARTING]
        lists = [facts.settings.get("max_lrs" if facts.class_name in CYCLIC else "base_lrs") for facts in owned]
        return [float(rate) for rates in lists if isinstance(rates, list | tuple) for rate in rates]

    def _may_step_up(self, name: str) -> bool:
        """A scheduler of the decaying kind whose settings make it step up."""
        return any(
            facts.class_name == "ConstantLR" or float(facts.settings.get("gamma") or 0.0) > 1.0
            for facts in self._owned(name)
        )

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
