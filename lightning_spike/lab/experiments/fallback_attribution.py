"""What is known of the steps around a trouble whose beginning is out of reach: what the lab has told before, and what the present steps do."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from lightning_spike.lab.experiments.blame import blame_steps
from lightning_spike.lab.experiments.step_size import Consistency
from lightning_spike.lab.experiments.wording import blame_text, consistency_text
from lightning_spike.records import Episode, Finding
from lightning_spike.store import TrainerStateStore

SAME: Final = 0.7
"""Share of the learning rate of then from which it is still about the same."""
ANSWERS: Final = frozenset({"blame", "nonfinite_origin", "outside"})
"""Findings that say whose a trouble is."""


def steps_too_long(steps: Consistency) -> dict[str, object]:
    """The detail of a finding on steps that are too long, in a run without an episode."""
    return dataclasses.asdict(steps) | {"p_chronic": steps.p_chronic, "text": consistency_text(steps)}


def blamed_on_steps(episode: Episode, why: str, steps: Consistency | Finding) -> list[Finding]:
    """The steps are to blame for an episode that could not be run again.

    Args:
        episode: The episode.
        why: Why it could not.
        steps: What the present steps did, or what was found before.
    """
    whose = blame_steps()
    gone = f"The beginning could not be run again: {why}."
    if isinstance(steps, Finding):
        text = f"{gone} At step {steps.at.step} before it steps were too long already: {steps.detail['text']}"
        return [_about(episode, "blame", {"shares": dict(whose.shares), "first": whose.first, "text": text})]
    text = f"{gone} {blame_text(whose)}"
    return [
        _about(episode, "consistency", steps_too_long(steps)),
        _about(episode, "blame", {"shares": dict(whose.shares), "first": whose.first, "text": text}),
    ]


def _about(episode: Episode, kind: str, detail: Mapping[str, object]) -> Finding:
    return Finding(detector="lab", kind=kind, at=episode.onset, detail={"episode": episode.id, **detail})


def unexplained(findings: Sequence[Finding]) -> str | None:
    """Why the way to the trouble could not be run again, where that has left open whose it is; `None` where it has not."""
    split = next((f.detail for f in findings if f.kind == "split"), None)
    if split is None or split["exact"] or split["verdict"] == "data" or any(f.kind in ANSWERS for f in findings):
        return None
    return str(split["why_not_exact"])


def told_before(store: TrainerStateStore, episode: Episode) -> Finding | None:
    """The newest finding from before the episode that steps were too long, if learning rates have not come down since; `None` where there is none. Pure."""
    told = [f for f in store.findings if _blames_steps(f) and f.at.ordinal < episode.onset.ordinal]
    return next((f for f in reversed(told) if _is_same_rate(store, f.at.ordinal, episode.onset.ordinal)), None)


def _blames_steps(finding: Finding) -> bool:
    of_episode = finding.kind == "blame" and finding.detail["first"] == "intrinsic"
    return finding.detector == "lab" and (finding.kind == "steps_too_long" or of_episode)


def _is_same_rate(store: TrainerStateStore, then: int, now: int) -> bool:
    history = store.history
    pairs = [
        (history.before(s, then + 1, 1), history.before(s, now + 1, 1)) for s in history.signals if s.startswith("lr-")
    ]
    return all(float(new[0]) >= SAME * float(old[0]) for old, new in pairs if old.size and new.size)
