"""The scene of an episode, put together in the running training from what its callbacks share."""

import dataclasses
from typing import Final, Self

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.actions.batch_ring import BatchRing
from lightning_spike.actions.snapshot import Snapshots
from lightning_spike.flight.loop import Flight
from lightning_spike.flight.participant import TrainingBatch
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.outside_writes import OutsideWrites
from lightning_spike.lab.recorded_losses import recorded_losses
from lightning_spike.lab.scene import WINDOW, Scene
from lightning_spike.lab.update_settings import UpdateSettings
from lightning_spike.records import Episode, EpisodeKind
from lightning_spike.store import History

__all__ = ["EXAMINED", "REACH", "Witnesses", "live_scene"]

EXAMINED: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE})
"""Kinds of episodes that have a moment to go back to."""

REACH: Final = 72
"""Batches kept for the re-run: the cadence of the snapshots (16 to 50), what proves one of them healthy (8), and controls from before it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Witnesses:
    """What remembers enough of the run for an episode to be run again; shared by all callbacks of a flight."""

    ring: BatchRing
    snapshots: Snapshots
    settings: UpdateSettings
    writes: OutsideWrites
    history: History

    @classmethod
    def of(cls, flight: Flight, trainer: Trainer, module: LightningModule) -> Self:
        """Those of a flight; they take part in it from now on, if they did not already."""
        ring = flight.share(BatchRing, BatchRing, trainer, module)
        ring.want(depth=REACH)
        snapshots = flight.share(Snapshots, Snapshots, trainer, module)
        snapshots.want_near(REACH)
        return cls(
            ring=ring,
            snapshots=snapshots,
            settings=flight.share(UpdateSettings, UpdateSettings, trainer, module),
            writes=flight.share(OutsideWrites, OutsideWrites, trainer, module),
            history=flight.store.history,
        )


def live_scene(batch: TrainingBatch, episode: Episode, witnesses: Witnesses, *, controls: int) -> Scene:
    """What an episode needs to be run again; references to what is held, nothing is copied. Never blocks.

    Args:
        batch: The batch that the loop is at.
        episode: One of the kinds in `EXAMINED`.
        witnesses: Those of the run.
        controls: Ordinary batches to compare with, at most.

    Raises:
        CannotReplay: Something that a re-run needs is not there; the message says what.
    """
    onset = episode.onset.ordinal
    snapshot = witnesses.snapshots.latest_healthy(before=onset)
    reach = range(max(onset - 2 * WINDOW, 0), batch.at.ordinal + 1)
    losses = recorded_losses(witnesses.history, reach)
    if witnesses.ring.entry(onset) is None:
        msg = f"the batch of the onset (step {episode.onset.step}) is not held any more"
        raise CannotReplay(msg)
    if snapshot is None:
        unavailable = witnesses.snapshots.unavailable
        msg = unavailable or "there is no snapshot from before the onset that has proven healthy"
        raise CannotReplay(msg)
    if onset not in losses:
        msg = "the training loss at the onset was not recorded"
        raise CannotReplay(msg)
    return Scene(
        trainer=batch.trainer,
        module=batch.module,
        episode=episode,
        snapshot=snapshot,
        entries=tuple(witnesses.ring.entries()),
        settings=witnesses.settings.by_ordinal,
        losses=losses,
        controls=controls,
        writes=tuple(witnesses.writes.writes),
    )
