"""A scene that was written and read back gives, in another module and trainer, the measurements of the live
examination, number by number."""

import collections
import dataclasses
import json
import math
import shutil
import sys
import types

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.utils.data import DataLoader, default_collate
from training_tasks import TASKS, Digits, digits, train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.errors import ConfigurationError
from lightning_spike.lab import scene_files
from lightning_spike.replay import Examiner
from lightning_spike.store import TrainerStateStore

SPOILT = 84
"""The batch that goes wrong, 34 after a snapshot."""


class Spoil(Callback):
    """Makes one image of one batch not finite; to stand before the suite, so that it sees what was done."""

    count = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == SPOILT:
            image_of(batch)[3, 0, 2, 2] = math.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.count == SPOILT:
            for p in pl_module.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p)


def image_of(batch):
    return batch["image"][0] if isinstance(batch, dict) else batch[0]


def recorded(make, folder, *, spoilt_before=True, **options):
    """A run with one episode: what was measured live, and its scene."""
    seed_everything(0, verbose=False)
    ours = [CounterfactualReplay(), SceneRecorder(dirpath=folder)]
    callbacks = [Spoil(), *ours] if spoilt_before else [*ours, Spoil()]
    trainer = train(make(), callbacks, folder, max_epochs=3, **options)
    store = TrainerStateStore.of(trainer)
    (scene,) = scene_files.find_scenes(folder / "scenes")
    assert store.disabled == []
    return store.experiments[1], scene


def examined(scene, module, **options):
    """What is measured in a module with other weights, after other random numbers."""
    seed_everything(99, verbose=False)
    examiner = Examiner([scene])
    trainer = Trainer(
        callbacks=[examiner], max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    with pytest.raises(Exception) as way_out:  # noqa: PT011 - the examiner's own way out of the fit
        trainer.fit(module, DataLoader(digits(), batch_size=16))
    if type(way_out.value).__name__ != "_Examined":
        raise way_out.value
    return examiner.replayed[0]


class Counting(Digits):
    """Its loss depends on what it keeps in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, collections.deque([1.0], maxlen=3)

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen.append(1.0 + 0.1 * self.calls)
        return super().training_step(batch, batch_idx) * sum(self.seen)


@dataclasses.dataclass
class Sample:
    label: torch.Tensor
    name: str


class Nested(Digits):
    """Its batch is a dict of a tuple, a dataclass, strings and None."""

    def training_step(self, batch, batch_idx):
        image, scale = batch["image"]
        return F.cross_entropy(self(image * scale), batch["sample"].label)


def nested(samples):
    x, y = default_collate(samples)
    return {"image": (x, torch.full((), 0.9)), "sample": Sample(y, "digits"), "paths": ["a.png", None], "": {}}


def loss_scaler():
    """The scale doubles every nine steps: at the onset it is not what it begins with."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=9))


CASES = TASKS | {
    "counting": (Counting, {}),
    "bf16": (Digits, {"precision": "bf16-mixed"}),
    "loss scaler": (Digits, {"plugins": loss_scaler}),
}


def _fresh(options):
    """With a plugin of its own, as another process has."""
    return {name: [value()] if name == "plugins" else value for name, value in options.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_measurements_are_those_of_the_live_examination(case, tmp_path):
    make, options = CASES[case]
    live, scene = recorded(make, tmp_path, **_fresh(options))
    replayed = examined(scene, make(), **_fresh(options))
    assert repr(replayed.experiments) == repr(live)
    assert replayed.examined
    assert replayed.experiments.replay.exact, replayed.experiments.replay.failure


def test_so_are_those_of_an_examination_that_knows_only_the_present_weights(tmp_path):
    """Where a batch was changed in place the run cannot be made again.

    Then weights from before stand against those of now.
    """
    live, scene = recorded(Digits, tmp_path, spoilt_before=False)
    replayed = examined(scene, Digits())
    assert repr(replayed.experiments) == repr(live)
    assert "in place" in replayed.experiments.replay.failure


def test_a_nested_batch_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "training_tasks.DataLoader", lambda *args, **kwargs: DataLoader(*args, **kwargs, collate_fn=nested)
    )
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Sample=Sample, Nested=Nested))
    live, scene = recorded(Nested, tmp_path)
    assert repr(examined(scene, Nested()).experiments) == repr(live)
    structure = json.loads((scene / "structure.json").read_text())
    assert "Sample" in json.dumps(structure["scene"]["entries"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return recorded(Digits, tmp_path_factory.mktemp("run"))[1]


class Wider(Digits):
    def __init__(self):
        super().__init__()
        self.net[5] = torch.nn.Linear(512, 11)


class Deeper(Digits):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Linear(3, 3)


class Adam(Digits):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


MISFITS = [
    (Wider, r"net\.5\.weight of shape \(10, 512\).*net\.5\.weight of shape \(11, 512\)"),
    (Deeper, r"no more\.weight"),
    (Adam, "SGD over 6.*Adam over 6"),
]


@pytest.mark.parametrize(("other", "said"), MISFITS, ids=["shape", "name", "optimizer"])
def test_a_module_that_does_not_fit_is_refused(other, said, scene):
    with pytest.raises(ConfigurationError, match=said) as error:
        examined(scene, other())
    assert "Give the config that the run was started with" in str(error.value)


def _newer(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))


def _cut_short(folder):
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


BROKEN = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no json": lambda folder: (folder / "manifest.json").write_text("{"),
    "newer": _newer,
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "cut short": _cut_short,
    "structure": lambda folder: (folder / "structure.json").write_text('{"scene": {}}'),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_scene_is_refused(how, scene, tmp_path):
    shutil.copytree(scene, tmp_path / "episode_0001")
    BROKEN[how](tmp_path / "episode_0001")
    with pytest.raises(ConfigurationError, match=r"expected a (whole )?scene"):
        examined(tmp_path / "episode_0001", Digits())


def test_its_parts_are_readable_without_this_package(scene):
    manifest = json.loads((scene / "manifest.json").read_text())
    assert manifest["episode"]["onset"]["ordinal"] == SPOILT
    assert manifest["shapes"]["net.5.weight"] == [10, 512]
    assert manifest["module"] == "training_tasks:Digits"
    assert manifest["versions"]["torch"]
    size = sum(file.stat().st_size for file in scene.iterdir())
    assert manifest["tensor_bytes"] < size < manifest["tensor_bytes"] + 500_000


def test_what_breaks_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene_files, "save_file", full)
    seed_everything(0, verbose=False)
    callbacks = [Spoil(), SceneRecorder(dirpath=tmp_path / "spike")]
    trainer = train(Digits(), callbacks, tmp_path, max_epochs=3)
    assert [*(tmp_path / "spike" / "scenes").iterdir()] == []
    assert any("No space left" in remark for remark in TrainerStateStore.of(trainer).remarks)
