"""The loss scale of mixed precision.

Moves that no scaler makes by itself, updates skipped too often, a scale that is too low to be of use.
"""

from collections import deque
from typing import Final

from lightning_spike.records import Finding, StepRow

LEAP: Final = 16.0
"""Factor between the scales of two updates from which the scaler did not make it: it grows by 2 and backs off by 0.5
(torch.amp.GradScaler)."""
SETTLES: Final = 32
"""Updates at the start in which the scaler looks for its scale: from 65,536 down to 1 it is 16 skips."""
WINDOW: Final = 100
SKIPS: Final = 3
"""Skipped updates among the last `WINDOW` that are too many: one in 2,000 is usual (science.md 2.4)."""
LEAST: Final = 1.0
"""A scale below is none: it makes gradients smaller (the same)."""
CONFIRMED: Final = 3
"""Updates in a row below it before it is said."""


class LossScaleDetector:
    """Looks at `loss_scale` and `skipped_step`; findings of the detector `"precision"`.

    `"scale_leapt"` (`before`, `after`): the scale is another by a factor of 16 or more than at the update before.
    `"often_skipped"` (`skips`, `of`, `scale`): 3 of the last 100 updates were skipped because a gradient was not
    finite; said again only after 100 updates. `"scale_too_low"` (`scale`): it is below 1 for three updates in a row;
    said once. Each with `text`.
    """

    def __init__(self) -> None:
        self._scale: float | None = None
        self._updates = 0
        self._skipped: deque[bool] = deque(maxlen=WINDOW)
        self._quiet = 0
        self._low = 0

    def observe(self, row: StepRow) -> list[Finding]:
        """Take in a batch; nothing where it had no update or the run has no scaler."""
        scale = row.values.get("loss_scale")
        if scale is None:
            return []
        self._updates += 1
        found = [*self._leapt(row, scale), *self._often(row, scale), *self._too_low(row, scale)]
        self._scale = scale
        return found

    def _leapt(self, row: StepRow, scale: float) -> list[Finding]:
        before = self._scale
        if before is None or not before > 0.0 or 1.0 / LEAP < scale / before < LEAP:
            return []
        text = f"The loss scale went from {before:.4g} to {scale:.4g} from one update to the next; a scaler moves by factors of 2."
        return [_finding(row, "scale_leapt", text, before=before, after=scale)]

    def _often(self, row: StepRow, scale: float) -> list[Finding]:
        now = row.values.get("skipped_step") == 1.0
        if self._updates > SETTLES:
            self._skipped.append(now)
        self._quiet = max(self._quiet - 1, 0)
        skips = sum(self._skipped)
        if not now or skips < SKIPS or self._quiet:
            return []
        self._quiet = WINDOW
        text = f"{skips} of the last {len(self._skipped)} updates were skipped, for a gradient was not finite under a loss scale of {scale:.4g}."
        return [_finding(row, "often_skipped", text, skips=skips, of=len(self._skipped), scale=scale)]

    def _too_low(self, row: StepRow, scale: float) -> list[Finding]:
        self._low = self._low + 1 if scale < LEAST else 0
        if self._low != CONFIRMED:
            return []
        text = (
            f"The loss scale is {scale:.3g}: below 1 it makes gradients smaller, and they are lost in half precision."
        )
        return [_finding(row, "scale_too_low", text, scale=scale)]


def _finding(row: StepRow, kind: str, text: str, **detail: float) -> Finding:
    return Finding(detector="precision", kind=kind, at=row.at, detail={**detail, "text": text})
