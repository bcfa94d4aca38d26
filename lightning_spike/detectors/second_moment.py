"""Second moments that lag behind gradients that grow: seen in RMS_t, over several looks in a row."""

import statistics
from collections import deque
from typing import Final

from lightning_spike.records import Finding, StepRow

STALE: Final = 2.3
"""RMS_t from which an update is far longer than the second moment knows (Wortsman et al. 2023, arXiv 2304.13013)."""
LOOKS: Final = 4
"""Looks in a row above it: single ones have it in healthy runs, where a coordinate had no gradient before."""
BEFORE: Final = 8
"""Looks that what is usual is taken from, which keeps out the beginning of a run."""
MORE: Final = 2.0
"""Factor over the usual RMS_t."""
GREW: Final = 3.0
"""Factor on the gradient norm, as `LARGE` in `gradient_explosion`: what does not grow does not leave its second moment
behind."""


class SecondMomentDetector:
    """Looks at `update_rms` and `grad_norm`; findings of the detector `"optimizer"`.

    `"second_moment_stale"` (`rms`, `usual`, `grad_norm`, `grad_norm_before`, `text`): RMS_t above 2.3 and twice its
    usual in four looks in a row, over which the gradients are three times as large as before. Said once for each such
    stretch.
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque(maxlen=BEFORE + LOOKS)
        self._told = False

    def observe(self, row: StepRow) -> list[Finding]:
        """Take in a batch; nothing where RMS_t was not measured."""
        rms, norm = row.values.get("update_rms"), row.values.get("grad_norm")
        if rms is None or norm is None:
            return []
        if self._told:
            self._told = rms >= STALE
            return []
        self._looks.append((rms, norm))
        before, now = list(self._looks)[:BEFORE], list(self._looks)[BEFORE:]
        if len(now) < LOOKS:
            return []
        usual, high = statistics.median(r for r, _ in before), min(r for r, _ in now)
        norm_before, norm_now = statistics.median(n for _, n in before), statistics.median(n for _, n in now)
        if not (high >= max(STALE, MORE * usual) and norm_now >= GREW * norm_before > 0.0):
            return []
        self._told = True
        self._looks.clear()
        text = (
            f"In the last {LOOKS} looks RMS_t was at least {high:.3g} (usually {usual:.3g}): the gradients grew from {norm_before:.3g} to {norm_now:.3g}, faster than the second "
            "moment follows, and updates are too long."
        )
        detail = {"rms": high, "usual": usual, "grad_norm": norm_now, "grad_norm_before": norm_before, "text": text}
        return [Finding(detector="optimizer", kind="second_moment_stale", at=row.at, detail=detail)]
