"""Settings of the optimizer: what they were at the start, and which changed before the loss rose."""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis.constants import NEAR, REACH
from lightning_spike.diagnosis.observation import Observation
from lightning_spike.diagnosis.observations.outside import last_possible
from lightning_spike.diagnosis.observations.shared_evidence import batches
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Finding, number

SETTING_LEVELS: Final = ("just before", "before", "long before", "no episode")
"""Levels of `setting_change`."""


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


def changed_setting(view: EpisodeView, wrong: Callable[[SettingChange], bool], *names: str) -> SettingChange | None:
    """The last change of one of these settings, for which `wrong` holds, that may have brought the episode about.

    Of betas the first is taken.

    One that was put back before the episode counts as well: what it did to the weights stays.
    """
    noted = view.findings("optimizer", "settings_changed", first=0, last=last_possible(view))
    found = [change for finding in noted if (change := _change(finding)) is not None and change.name in names]
    meant = [change for change in found if wrong(change)]
    return meant[-1] if meant else None


def setting_change(view: EpisodeView, change: SettingChange, *, soon: int = NEAR) -> Observation:
    """A wrong value weighs the more the sooner the loss rose after it; where it has not risen, the value alone counts.

    Args:
        view: The episode.
        change: What was changed.
        soon: Batches within which such a value shows.
    """
    lag = view.onset - change.ordinal
    if not view.store.episodes:
        level, when = "no episode", ""
    else:
        level = _nearness(lag, soon)
        when = f", {batches(lag)} before the loss rose" if lag > 0 else ", as the loss rose"
    text = f"{change.text}{when}."
    signal = f"optimizer/{change.name}"
    return Observation(
        level=level, text=text, signal=signal, step=change.step, observed=change.after, expected=change.before
    )


def _nearness(lag: int, soon: int) -> str:
    if 0 <= lag <= soon:
        return "just before"
    return "before" if abs(lag) <= REACH else "long before"


def _change(finding: Finding) -> SettingChange | None:
    before, after = (_first_number(finding.detail.get(key)) for key in ("before", "after"))
    if before is None or after is None:
        return None
    return SettingChange(
        name=str(finding.detail.get("name")),
        before=before,
        after=after,
        ordinal=finding.at.ordinal,
        step=finding.at.step,
        optimizer=str(finding.detail.get("optimizer")),
    )


def _first_number(value: object) -> float | None:
    """Of two betas the first, which is the momentum's."""
    return number(value[0]) if isinstance(value, list | tuple) and value else number(value)
