"""Second moments that lag behind growing gradients, by RMS_t over several samples."""

import statistics
from collections import deque
from typing import Final

from lightning_spike.records import Finding, StepRow

MIN_RMS: Final = 2.3
"""Smallest RMS_t of an update far longer than the second moment allows (Wortsman et al. 2023, arXiv 2304.13013)."""
CONFIRMATIONS: Final = 4
"""Samples in a row above it: single ones occur where a coordinate had no gradient before; engineering choice."""
REFERENCE_SAMPLES: Final = 8
"""Samples before them that are the reference; engineering choice."""
MIN_RMS_FACTOR: Final = 2.0
"""Smallest factor over the usual RMS_t; engineering choice."""
MIN_GROWTH: Final = 3.0
"""Smallest factor of the gradient norm: only growing gradients leave their second moment behind; engineering choice."""


class SecondMomentDetector:
    """Checks `update_rms` and `grad_norm`; findings of the detector `"optimizer"`.

    `"second_moment_stale"` (`rms`, `usual`, `grad_norm`, `grad_norm_before`, `text`): RMS_t is above 2.3 and twice its
    usual value in four samples in a row, while gradients are three times as large as before. Reported once per stretch.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=REFERENCE_SAMPLES + CONFIRMATIONS)
        self._reported = False

    def observe(self, row: StepRow) -> list[Finding]:
        """Judge a batch; returns nothing where RMS_t was not measured."""
        rms, norm = row.values.get("update_rms"), row.values.get("grad_norm")
        if rms is None or norm is None:
            return []
        if self._reported:
            self._reported = rms >= MIN_RMS
            return []
        self._samples.append((rms, norm))
        before, now = list(self._samples)[:REFERENCE_SAMPLES], list(self._samples)[REFERENCE_SAMPLES:]
        if len(now) < CONFIRMATIONS:
            return []
        usual, high = statistics.median(r for r, _ in before), min(r for r, _ in now)
        norm_before, norm_now = statistics.median(n for _, n in before), statistics.median(n for _, n in now)
        if not (high >= max(MIN_RMS, MIN_RMS_FACTOR * usual) and norm_now >= MIN_GROWTH * norm_before > 0.0):
            return []
        self._reported = True
        self._samples.clear()
        text = (
            f"RMS_t was at least {high:.3g} in the last {CONFIRMATIONS} samples (usually {usual:.3g}). Gradients grew "
            f"from {norm_before:.3g} to {norm_now:.3g}, faster than the second moment follows: updates are too long."
        )
        detail = {"rms": high, "usual": usual, "grad_norm": norm_now, "grad_norm_before": norm_before, "text": text}
        return [Finding(detector="optimizer", kind="second_moment_stale", at=row.at, detail=detail)]
