"""Step sizes for an episode whose onset cannot be replayed.

Those that the lab measured before it, or those of the present updates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

from lightning_spike.diagnosis.judgement import (
    Group,
    SplitVerdict,
    jump_shares,
    split_verdict,
    steps_too_long_in_quiet_run,
)
from lightning_spike.experiments import Experiments, StepSize
from lightning_spike.records import Episode
from lightning_spike.store import TrainerStateStore

MIN_EQUAL_RATE: Final = 0.7
"""Ratio to the earlier learning rate from which it counts as unchanged; engineering choice."""


def with_step_size(found: Experiments | None, episode: Episode, reason: str, steps: StepSize) -> Experiments:
    """The experiments on an episode with step sizes in place of a replay.

    Args:
        found: What else was measured; `None` for nothing.
        episode: The episode.
        reason: Why its onset could not be replayed.
        steps: The step sizes.
    """
    known = Experiments(episode=episode.id) if found is None else found
    return dataclasses.replace(known, failure=reason, step_size=steps)


def unexplained(found: Experiments) -> str | None:
    """Why the onset could not be replayed, where that leaves the cause open; `None` where it does not."""
    replay = found.replay
    if found.split is None or replay is None or replay.exact or split_verdict(found) is SplitVerdict.DATA:
        return None
    answered = found.first_nonfinite is not None or found.outside_change is not None
    return None if answered else replay.failure


def earlier_step_size(store: TrainerStateStore, episode: Episode) -> StepSize | None:
    """The newest too long step sizes from before an episode, if learning rates are still as high; else `None`."""
    onset = episode.onset.ordinal
    tests = [
        (t.at.ordinal, t.at.step, t.result) for t in store.step_size_tests if steps_too_long_in_quiet_run(t.result)
    ]
    for other in store.episodes:
        found = store.experiments.get(other.id)
        shares = jump_shares(found)
        if found is not None and found.step_size is not None and _first(shares) is Group.INTRINSIC:
            tests.append((other.onset.ordinal, other.onset.step, found.step_size))
    earlier = sorted((t for t in tests if t[0] < onset), key=lambda t: t[0])
    steps = next((t for t in reversed(earlier) if _is_same_rate(store, t[0], onset)), None)
    return None if steps is None else dataclasses.replace(steps[2], source="earlier", at_step=steps[1])


def _first(shares: Mapping[Group, float]) -> Group | None:
    return max(shares, key=lambda group: shares[group], default=None)


def _is_same_rate(store: TrainerStateStore, then: int, now: int) -> bool:
    history = store.history
    pairs = [
        (history.before(s, then + 1, 1), history.before(s, now + 1, 1)) for s in history.signals if s.startswith("lr-")
    ]
    return all(float(new[0]) >= MIN_EQUAL_RATE * float(old[0]) for old, new in pairs if old.size and new.size)
