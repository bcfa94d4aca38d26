"""What ranks can use together of what each of them holds."""

import dataclasses
from types import SimpleNamespace

import pytest
from lab.made import entry, moment

from lightning_spike.errors import CannotReplay
from lightning_spike.lab.live_scene import Witnesses, live_scene
from lightning_spike.ranks.rank_coordination import Ranks
from lightning_spike.record.outside_writes import OutsideWrite
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.records import Episode, EpisodeKind, StepRow
from lightning_spike.store import History

ONSET = 30
WRITE = OutsideWrite(ordinal=20, kind="weights", names=("a",))


class Two(Ranks):
    """This one and another, which holds what `other` says."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def gather(self, mine):
        return [mine, *held_by(self.other)]


def held_by(witnesses):
    """What the other rank would send."""
    sent = []

    class Listens(Ranks):
        def gather(self, mine):
            sent.append(mine)
            return [mine]

    live_scene(AT, EPISODE, witnesses, controls=4, ranks=Listens())
    return sent


AT = TrainingBatch(trainer=None, module=None, at=moment(ONSET + 1), batch=None)
EPISODE = Episode(
    id=1, kind=EpisodeKind.SPIKE, onset=moment(ONSET), noticed=moment(ONSET), peak=moment(ONSET), severity=9.0
)


def witnesses(snapshots=(16, 24), first=10, losses=None, writes=(), entries=None):
    history = History()
    for k, loss in (losses or dict.fromkeys(range(ONSET + 2), 1.0)).items():
        history.append(StepRow(at=moment(k), values={"loss": loss}))
    held = entries or [entry(k) for k in range(first, ONSET + 2)]
    taken = [SimpleNamespace(at=moment(k)) for k in snapshots]
    return Witnesses(
        ring=SimpleNamespace(entries=lambda: held),
        snapshots=SimpleNamespace(verified=lambda before: taken, unavailable=None),
        settings=SimpleNamespace(by_ordinal={}, modes={}),
        writes=SimpleNamespace(writes=list(writes)),
        history=history,
    )


def scene_of(mine, other):
    return live_scene(AT, EPISODE, mine, controls=4, ranks=Two(other))


def test_the_newest_snapshot_and_the_batches_that_all_hold():
    scene = scene_of(witnesses(snapshots=(16, 24), first=8), witnesses(snapshots=(8, 16), first=12))
    assert scene.snapshot.at.ordinal == 16
    assert [e.at.ordinal for e in scene.entries] == list(range(12, ONSET + 2))


def test_losses_are_means_and_only_those_that_all_have():
    scene = scene_of(witnesses(losses={28: 1.0, 30: 2.0, 31: 5.0}), witnesses(losses={28: 3.0, 29: 1.0, 30: 4.0}))
    assert dict(scene.losses) == {28: 2.0, 30: 3.0}


def test_what_is_spoilt_or_written_on_one_is_so_for_all():
    spoilt = [dataclasses.replace(entry(k), mutated=k == 15) for k in range(10, ONSET + 2)]
    scene = scene_of(witnesses(writes=[WRITE]), witnesses(entries=spoilt, writes=[WRITE]))
    assert [e.at.ordinal for e in scene.entries if e.mutated] == [15]
    assert scene.writes == (WRITE,)


def test_ranks_that_share_no_snapshot_or_place_are_refused():
    with pytest.raises(CannotReplay, match="no snapshot from before"):
        scene_of(witnesses(snapshots=(16,)), witnesses(snapshots=(24,)))
    shifted = [
        dataclasses.replace(e, at=dataclasses.replace(e.at, step=e.at.step - 1))
        for e in map(entry, range(10, ONSET + 2))
    ]
    with pytest.raises(CannotReplay, match="not at the same place"):
        scene_of(witnesses(), witnesses(entries=shifted))
