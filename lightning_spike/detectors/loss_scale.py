"""Loss scale of mixed precision: jumps that no scaler makes, too many skipped updates, a useless scale."""

from collections import deque
from typing import Final

from lightning_spike.records import Finding, StepRow

MAX_FACTOR: Final = 16.0
"""Factor between the scales of two updates that the scaler cannot cause: it grows by 2 and backs off by 0.5
(torch.amp.GradScaler, science.md 2.2)."""
SETTLING_UPDATES: Final = 32
"""First updates, in which the scaler searches its scale: from 65,536 to 1 takes 16 skips; engineering choice."""
WINDOW: Final = 100
"""Updates among which skipped ones are counted (science.md 2.2)."""
MAX_SKIPS: Final = 3
"""Skipped updates among the last `WINDOW` that are too many; one in 2,000 is usual (science.md 2.2)."""
MIN_SCALE: Final = 1.0
"""Scale below which gradients shrink (science.md 2.2)."""
CONFIRMATIONS: Final = 3
"""Updates in a row below `MIN_SCALE` before it is reported; engineering choice."""


class LossScaleDetector:
    """Checks `loss_scale` and `skipped_step`; findings of the detector `"precision"`, each with `text`.

    - `"scale_leapt"` (`before`, `after`): the scale changed by a factor of 16 or more between two updates.
    - `"often_skipped"` (`skips`, `of`, `scale`): 3 of the last 100 updates were skipped for a non-finite gradient.
      Repeated after 100 updates at the earliest.
    - `"scale_too_low"` (`scale`): it is below 1 for three updates in a row. Reported once.
    """

    def __init__(self) -> None:
        self._scale: float | None = None
        self._updates = 0
        self._skipped: deque[bool] = deque(maxlen=WINDOW)
        self._quiet = 0
        self._low = 0

    def observe(self, row: StepRow) -> list[Finding]:
        """Judge a batch; returns nothing without an update or a scaler."""
        scale = row.values.get("loss_scale")
        if scale is None:
            return []
        self._updates += 1
        found = [*self._leapt(row, scale), *self._often(row, scale), *self._too_low(row, scale)]
        self._scale = scale
        return found

    def _leapt(self, row: StepRow, scale: float) -> list[Finding]:
        before = self._scale
        if before is None or not before > 0.0 or 1.0 / MAX_FACTOR < scale / before < MAX_FACTOR:
            return []
        text = (
            f"The loss scale changed from {before:.4g} to {scale:.4g} in one update; a scaler moves it by factors of 2."
        )
        return [_finding(row, "scale_leapt", text, before=before, after=scale)]

    def _often(self, row: StepRow, scale: float) -> list[Finding]:
        now = row.values.get("skipped_step") == 1.0
        if self._updates > SETTLING_UPDATES:
            self._skipped.append(now)
        self._quiet = max(self._quiet - 1, 0)
        skips = sum(self._skipped)
        if not now or skips < MAX_SKIPS or self._quiet:
            return []
        self._quiet = WINDOW
        text = (
            f"{skips} of the last {len(self._skipped)} updates were skipped: "
            f"a gradient was not finite at a loss scale of {scale:.4g}."
        )
        return [_finding(row, "often_skipped", text, skips=skips, of=len(self._skipped), scale=scale)]

    def _too_low(self, row: StepRow, scale: float) -> list[Finding]:
        self._low = self._low + 1 if scale < MIN_SCALE else 0
        if self._low != CONFIRMATIONS:
            return []
        text = f"The loss scale is {scale:.3g}: below 1 it shrinks gradients, which half precision then loses."
        return [_finding(row, "scale_too_low", text, scale=scale)]


def _finding(row: StepRow, kind: str, text: str, **detail: float) -> Finding:
    return Finding(detector="precision", kind=kind, at=row.at, detail={**detail, "text": text})
