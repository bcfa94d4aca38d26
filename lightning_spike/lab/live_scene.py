"""The scene of an episode, put together in the running training from what its callbacks share."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.errors import CannotReplay, OnsetGone
from lightning_spike.experiments import OutsideWrite
from lightning_spike.flight.loop import Flight
from lightning_spike.lab.scene import NOISE_WINDOW, Scene
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks, mean_of
from lightning_spike.record.batch_ring import BatchRing
from lightning_spike.record.outside_writes import OutsideWrites
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.snapshot import Snapshot, Snapshots
from lightning_spike.record.update_settings import UpdateSettings
from lightning_spike.records import Episode, EpisodeKind, Moment
from lightning_spike.signals.loss import total_loss
from lightning_spike.store import History

EXAMINED: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE})
"""Kinds of episodes that have a moment to go back to."""

RECORDED_BATCHES: Final = 72
"""Batches recorded for a replay: the interval of the snapshots (16 to 50), those that prove one healthy (8), and
control batches before it; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Witnesses:
    """The recorders that a replay needs, shared by all callbacks of a flight."""

    ring: BatchRing
    snapshots: Snapshots
    settings: UpdateSettings
    writes: OutsideWrites
    history: History

    @classmethod
    def of(cls, flight: Flight, trainer: Trainer, module: LightningModule) -> Self:
        """Returns the recorders of a flight, and adds them to it if missing."""
        ring = flight.share(BatchRing, BatchRing, trainer, module)
        ring.want(depth=RECORDED_BATCHES)
        snapshots = flight.share(Snapshots, Snapshots, trainer, module)
        snapshots.want_near(RECORDED_BATCHES)
        return cls(
            ring=ring,
            snapshots=snapshots,
            settings=flight.share(UpdateSettings, UpdateSettings, trainer, module),
            writes=flight.share(OutsideWrites, OutsideWrites, trainer, module),
            history=flight.store.history,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One rank's recorded batches in plain values, for an agreement of all ranks."""

    snapshots: frozenset[int]
    """Ordinals of the healthy snapshots from before the onset."""
    places: Mapping[int, Moment]
    """Moments of the recorded batches, by ordinal."""
    mutated: frozenset[int]
    losses: Mapping[int, float]
    writes: tuple[OutsideWrite, ...]
    unavailable: str | None


def live_scene(
    batch: TrainingBatch, episode: Episode, witnesses: Witnesses, *, controls: int, ranks: Ranks = SINGLE_RANK
) -> Scene:
    """Returns the scene of an episode, with references to the recorded data and no copies.

    Does not block, but for waiting for the other ranks.

    With several ranks the scene is made of what all of them hold: the newest snapshot that every rank has, the batches
    that are there on all (each rank has its own), the means of the losses, everybody's outside writes. So all decide
    alike by it.

    Args:
        batch: The batch that the loop is at.
        episode: One of the kinds in `EXAMINED`; the same on all ranks.
        witnesses: Those of the run.
        controls: Ordinary batches to compare with, at most.
        ranks: Those that examine it together.

    Raises:
        OnsetGone: The batch of the onset or a snapshot from before it is not held, on one of the ranks.
        CannotReplay: Something else that a replay needs is not there; the message says what.
    """
    onset = episode.onset.ordinal
    everybody = ranks.gather(_held(batch, onset, witnesses))
    losses = _mean_losses(everybody)
    places = _common_places(everybody)
    snapshot = _common_snapshot(everybody, witnesses, onset)
    if onset not in places:
        msg = f"the batch of the onset (step {episode.onset.step}) is not held any more"
        raise OnsetGone(msg)
    if snapshot is None:
        unavailable = next((held.unavailable for held in everybody if held.unavailable), None)
        if unavailable is not None:
            raise CannotReplay(unavailable)
        msg = "there is no snapshot from before the onset that has proven healthy"
        raise OnsetGone(msg)
    if onset not in losses:
        msg = "the training loss at the onset was not recorded"
        raise CannotReplay(msg)
    mutated = frozenset[int]().union(*(held.mutated for held in everybody))
    entries = (entry for entry in witnesses.ring.entries() if entry.at.ordinal in places)
    writes = {write for held in everybody for write in held.writes}
    return Scene(
        trainer=batch.trainer,
        module=batch.module,
        episode=episode,
        snapshot=snapshot,
        entries=tuple(dataclasses.replace(e, mutated=True) if e.at.ordinal in mutated else e for e in entries),
        settings=witnesses.settings.by_ordinal,
        modes=dict(witnesses.settings.modes),
        losses=losses,
        controls=controls,
        writes=tuple(sorted(writes, key=lambda w: (w.ordinal, w.kind, w.names))),
        ranks=ranks,
    )


def _held(batch: TrainingBatch, onset: int, witnesses: Witnesses) -> _Held:
    reach = range(max(onset - 2 * NOISE_WINDOW, 0), batch.at.ordinal + 1)
    entries = witnesses.ring.entries()
    return _Held(
        snapshots=frozenset(snapshot.at.ordinal for snapshot in witnesses.snapshots.verified(before=onset)),
        places={entry.at.ordinal: entry.at for entry in entries},
        mutated=frozenset(entry.at.ordinal for entry in entries if entry.mutated),
        losses=recorded_losses(witnesses.history, reach),
        writes=tuple(witnesses.writes.writes),
        unavailable=witnesses.snapshots.unavailable,
    )


def _mean_losses(everybody: Sequence[_Held]) -> dict[int, float]:
    common = set[int].intersection(*(set(held.losses) for held in everybody))
    return {k: mean_of(held.losses[k] for held in everybody) for k in sorted(common)}


def _common_places(everybody: Sequence[_Held]) -> set[int]:
    common = set[int].intersection(*(set(held.places) for held in everybody))
    if any(held.places[k] != everybody[0].places[k] for held in everybody for k in common):
        msg = "the ranks are not at the same place in the run: the same batch has another number on each"
        raise CannotReplay(msg)
    return common


def _common_snapshot(everybody: Sequence[_Held], witnesses: Witnesses, onset: int) -> Snapshot | None:
    common = frozenset[int].intersection(*(held.snapshots for held in everybody))
    mine = {snapshot.at.ordinal: snapshot for snapshot in witnesses.snapshots.verified(before=onset)}
    return mine[max(common)] if common else None


def recorded_losses(history: History, ordinals: Iterable[int]) -> dict[int, float]:
    """The loss of each of these batches; the sum where a batch has several under manual optimisation.

    Batches without one are left out.
    """
    signals = [name for name in history.signals if name == "loss" or name.startswith("loss/")]
    losses: dict[int, float] = {}
    for ordinal in ordinals:
        named = {name: value for name in signals if (value := history.at(name, ordinal)) is not None}
        if (total := total_loss(named)) is not None:
            losses[ordinal] = total
    return losses
