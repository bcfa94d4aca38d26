"""Changes of the optimizer's settings that can have caused the episode."""

import dataclasses
from collections.abc import Callable
from typing import Final

from lightning_spike.diagnosis.batch_ranges import NEAR, REACH
from lightning_spike.diagnosis.observation import Observation
from lightning_spike.diagnosis.observations.outside import last_possible
from lightning_spike.diagnosis.observations.shared_evidence import before_rise
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Finding, number

SETTING_LEVELS: Final = ("just before", "before", "long before", "no episode")
"""Levels of `setting_change`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettingChange:
    """One numeric setting, before and after its change."""

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


def changed_setting(view: EpisodeView, is_wrong: Callable[[SettingChange], bool], *names: str) -> SettingChange | None:
    """The last wrong change of one of these settings that can have caused the episode; `None` without one.

    Of betas the first counts. A change that was undone before the episode counts too: the weights keep the damage.
    """
    noted = view.findings("optimizer", "settings_changed", first=0, last=last_possible(view))
    found = [change for finding in noted if (change := _change(finding)) is not None]
    wrong = [change for change in found if change.name in names and is_wrong(change)]
    return wrong[-1] if wrong else None


def setting_change(view: EpisodeView, change: SettingChange, *, soon: int = NEAR) -> Observation:
    """An observation of a wrong setting, by its distance to the onset.

    Args:
        view: The episode.
        change: What was changed.
        soon: Batches within which such a value shows.
    """
    lag = view.onset - change.ordinal
    level, when = "no episode", ""
    if view.store.episodes:
        level, when = _nearness(lag, soon), before_rise(lag)
    return Observation(
        f"{change.text}{when}.", level=level, signal=f"optimizer/{change.name}", step=change.step,
        observed=change.after, expected=change.before,
    )  # fmt: skip


def _nearness(lag: int, soon: int) -> str:
    if 0 <= lag <= soon:
        return "just before"
    return "before" if abs(lag) <= REACH else "long before"


def _change(finding: Finding) -> SettingChange | None:
    before, after = (_first_number(finding.detail.get(key)) for key in ("before", "after"))
    if before is None or after is None:
        return None
    name, optimizer = str(finding.detail.get("name")), str(finding.detail.get("optimizer"))
    at = finding.at
    return SettingChange(name=name, before=before, after=after, ordinal=at.ordinal, step=at.step, optimizer=optimizer)


def _first_number(value: object) -> float | None:
    """The number, or the first of two betas, which is the momentum's."""
    return number(value[0]) if isinstance(value, list | tuple) and value else number(value)
