"""The updates of the training since the target batch."""

import dataclasses

from lightning_spike.lab.replay.update import Update, updates_of
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox


def updates_since(scene: Scene, sandbox: Sandbox) -> list[Update]:
    """All updates since the target batch, from the first batch of its accumulation window on."""
    window = [e for e in scene.stretch if e.at.step == scene.spike.at.step]
    entries = [*window, *scene.after[1:], _beyond(scene)]
    return updates_of(entries, scene.settings, by_hand=not sandbox.module.automatic_optimization)


def _beyond(scene: Scene) -> RingEntry:
    """A placeholder for the next batch, where the last update ends."""
    last = scene.entries[-1]
    stepped = last.at.ordinal in scene.settings
    at = dataclasses.replace(last.at, ordinal=last.at.ordinal + 1, step=last.at.step + stepped)
    return dataclasses.replace(last, at=at)
