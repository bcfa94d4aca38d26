"""Settings of the optimizer: what they were at the start, and who changed one before the loss rose."""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, NEAR, REACH, STRONG
from lightning_spike.diagnosis.observations.outside import SUDDEN
from lightning_spike.diagnosis.observations.tells import batches, tell
from lightning_spike.records import Evidence, Finding

FIRST: Final = 0
"""Of two betas the one of the momentum."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettingChange:
    """One number among the settings, before and after."""

    name: str
    before: float
    after: float
    ordinal: int
    """The batch whose update was the first with the new value."""
    step: int
    optimizer: str

    @property
    def text(self) -> str:
        """`"eps of AdamW went from 1e-08 to 0 at step 160"`."""
        return f"{self.name} of {self.optimizer} went from {self.before:.4g} to {self.after:.4g} at step {self.step}"


def changed_setting(case: Case, wrong: Callable[[SettingChange], bool], *names: str) -> SettingChange | None:
    """The last change of one of these settings, for which `wrong` holds, that may have brought the episode about; of betas the first is taken.

    One that was put back before the episode counts as well: what it did to the weights stays.
    """
    until = max(case.onset, case.episode.peak.ordinal) if case.kind in SUDDEN else case.last
    told = case.findings("optimizer", "settings_changed", first=0, last=until)
    found = [change for finding in told if (change := _change(finding)) is not None and change.name in names]
    meant = [change for change in found if wrong(change)]
    return meant[-1] if meant else None


def setting_evidence(case: Case, change: SettingChange, *, soon: int = NEAR) -> Evidence:
    """A wrong value weighs the more the sooner the loss rose after it; where it has not risen, the value alone is told.

    Args:
        case: The episode.
        change: What was changed.
        soon: Batches in which such a value shows.
    """
    lag = case.onset - change.ordinal
    if not case.store.episodes:
        weight, when = DECISIVE, ""
    else:
        weight = DECISIVE + FAIR if 0 <= lag <= soon else DECISIVE if abs(lag) <= REACH else STRONG
        when = f", {batches(lag)} before the loss rose" if lag > 0 else ", as the loss rose"
    text = f"{change.text}{when}."
    return tell(
        f"optimizer/{change.name}", text, weight, step=change.step, observed=change.after, expected=change.before
    )


def _change(finding: Finding) -> SettingChange | None:
    detail = finding.detail
    before, after = (_one(detail.get(key)) for key in ("before", "after"))
    if before is None or after is None:
        return None
    return SettingChange(
        name=str(detail.get("name")),
        before=before,
        after=after,
        ordinal=finding.at.ordinal,
        step=finding.at.step,
        optimizer=str(detail.get("optimizer")),
    )


def _one(value: object) -> float | None:
    if isinstance(value, list | tuple):
        return number(value[FIRST]) if value else None
    return number(value)
