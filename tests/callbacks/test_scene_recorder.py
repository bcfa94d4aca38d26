"""What is written when an episode comes, what is not, and what the report says of it."""

import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate
from training_tasks import Digits, train

from lightning_spike.callbacks import scene_recorder
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.errors import ConfigurationError
from lightning_spike.lab.scene_files import find_scenes, read_manifest
from lightning_spike.records import Episode, EpisodeKind, Moment
from lightning_spike.store import TrainerStateStore

SPOILT = 84


class Spoil(Callback):
    """One pixel that is not finite, in these batches; no update is made of them. To stand before the suite."""

    def __init__(self, *ordinals):
        self.ordinals, self.count = ordinals or (SPOILT,), -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count in self.ordinals:
            batch[0][3, 0, 2, 2] = math.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.count in self.ordinals:
            for p in pl_module.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p)


def run(folder, *others, spoilt=(), make=Digits, epochs=3, **options):
    """The scenes, the actions that tell of them, and the remarks of a run."""
    seed_everything(0, verbose=False)
    recorder = SceneRecorder(dirpath=folder, **options)
    store = TrainerStateStore.of(train(make(), [Spoil(*spoilt), *others, recorder], folder, max_epochs=epochs))
    assert store.disabled == []
    return find_scenes(folder / "scenes"), [a for a in store.actions if a.action == "scene"], store.remarks


def test_a_scene_is_written_and_told(tmp_path):
    (scene,), (action,), remarks = run(tmp_path)
    assert scene == tmp_path / "scenes" / "episode_0001"
    assert action.detail["path"] == "scenes/episode_0001"
    assert action.detail["mb"] == round(sum(f.stat().st_size for f in scene.iterdir()) / 1e6, 3)
    assert remarks == []


def test_a_healthy_run_writes_nothing(tmp_path):
    scenes, actions, _ = run(tmp_path, spoilt=(10**6,))
    assert (scenes, actions) == ([], [])
    assert not (tmp_path / "scenes").exists()


def test_it_takes_as_many_controls_as_the_live_examination(tmp_path):
    (scene,), _, _ = run(tmp_path, CounterfactualReplay(controls=3))
    assert '"controls": 3' in (scene / "structure.json").read_text()


def test_one_that_is_too_large_is_said_once_and_not_written(tmp_path):
    scenes, actions, remarks = run(tmp_path, spoilt=(SPOILT, SPOILT + 30), epochs=4, max_mb=0.2)
    assert (scenes, actions) == ([], [])
    assert [r for r in remarks if "scene" in r] == [
        "No scenes are written for a replay after the run: one would take more than 0.2 MB (max_mb)."
    ]
    assert [*tmp_path.glob("scenes/*"), *tmp_path.glob("scenes/.*")] == []


def _with_function(samples):
    return [*default_collate(samples), lambda: 0]


class Three(Digits):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return functional.cross_entropy(self(x), y)


def test_a_batch_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def loader(*args, **kwargs):
        return DataLoader(*args, **kwargs, collate_fn=_with_function)

    monkeypatch.setattr("training_tasks.DataLoader", loader)
    scenes, _, remarks = run(tmp_path, make=Three)
    assert scenes == []
    (said,) = [r for r in remarks if "scene" in r]
    assert said.startswith("The scene of episode 1 was not written: entries.")
    assert "(builtins.function)" in said


def test_what_a_re_run_would_lack_is_said(tmp_path):
    scenes, _, remarks = run(tmp_path, spoilt=(0,), epochs=1)
    assert scenes == []
    assert remarks == [
        "The scene of episode 1 was not written: there is no snapshot from before the onset that has proven healthy."
    ]


def episode(number, severity):
    at = Moment(ordinal=number, step=number, epoch=0, batch_idx=number)
    return Episode(id=number, kind=EpisodeKind.SPIKE, onset=at, noticed=at, peak=at, severity=severity)


def test_the_most_severe_are_kept(tmp_path, monkeypatch):
    """Of six episodes two may stay: each that is worse takes the place of the least severe."""

    class Many(SceneRecorder):
        def act(self, batch, changed):
            if batch.at.ordinal in severities:
                new = episode(batch.at.ordinal, severities[batch.at.ordinal])
                self.flight.store.replace_episode(new)
                super().act(batch, [new])

    severities = {1: 5.0, 2: 9.0, 3: 4.0, 4: 7.0, 5: 7.0, 6: 99.0}
    written = []
    monkeypatch.setattr(scene_recorder, "live_scene", lambda batch, episode, witnesses, controls: episode)

    def write(folder, scene, facts, limit):
        written.append(scene.id)
        folder.mkdir(parents=True)
        return 1

    monkeypatch.setattr(scene_recorder, "write_scene", write)
    train(Digits(), [Many(dirpath=tmp_path, max_scenes=2)], tmp_path, max_epochs=1)
    assert written == [1, 2, 4, 6]
    assert sorted(p.name for p in (tmp_path / "scenes").iterdir()) == ["episode_0002", "episode_0006"]


def test_what_one_run_wrote_replaces_what_an_earlier_one_did(tmp_path):
    first = [read_manifest(scene)["run"]["started"] for scene in run(tmp_path)[0]]
    second = [read_manifest(scene)["run"]["started"] for scene in run(tmp_path)[0]]
    assert len(first) == len(second) == 1


@pytest.mark.parametrize(("name", "value"), [("max_scenes", 0), ("max_mb", 0), ("max_mb", "much"), ("dirpath", "")])
def test_an_argument_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        SceneRecorder(**{name: value})
