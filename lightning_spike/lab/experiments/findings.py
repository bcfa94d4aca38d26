"""How the lab's answers are noted."""

from collections.abc import Mapping
from typing import Any

from lightning_spike.lab.experiments.blame import Blame
from lightning_spike.lab.experiments.wording import blame_text
from lightning_spike.lab.scene import Scene
from lightning_spike.records import Episode, Finding


def finding(scene: Scene, kind: str, detail: Mapping[str, Any]) -> Finding:
    """One answer about the episode."""
    return Finding(detector="lab", kind=kind, at=scene.episode.onset, detail={"episode": scene.episode.id, **detail})


def blame_finding(scene: Scene, whose: Blame) -> Finding:
    """Whose the jump is."""
    return finding(scene, "blame", {"shares": dict(whose.shares), "first": whose.first, "text": blame_text(whose)})


def not_run(episode: Episode, why: str) -> Finding:
    """That an episode was not examined, and why."""
    return Finding(detector="lab", kind="not_run", at=episode.onset, detail={"episode": episode.id, "why": why})
