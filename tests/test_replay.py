"""`lightning-spike replay`: a run that is over, examined in a fresh process from what it wrote."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from lightning_spike.cli import main
from lightning_spike.codec import from_plain
from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.judgement import split_verdict
from lightning_spike.errors import CannotReplay
from lightning_spike.experiments import Experiments
from lightning_spike.report.json_file import with_nonfinite

ROOT = Path(__file__).parents[1]

MODULE = """
import json
import math
import sys

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI

from lightning_spike import CounterfactualReplay, SceneRecorder, SpikeCLI
from lightning_spike.codec import to_plain
from lightning_spike.demo.digits import DigitsData
from lightning_spike.demo.digits_cnn import DigitsCNN
from lightning_spike.store import TrainerStateStore


class Net(DigitsCNN):
    def on_train_epoch_start(self):
        self.scale = 1.0  # made here, used below

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


class Data(DigitsData):
    def train_dataloader(self):
        assert "replay" not in sys.argv[1:2], "a replay draws no data"
        return super().train_dataloader()


class Spoil(Callback):
    count = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == 84:
            batch[1].add_(5).remainder_(10)


class Told(Callback):
    def on_fit_end(self, trainer, pl_module):
        found = TrainerStateStore.of(trainer).experiments
        with open("live.json", "w") as file:
            json.dump([to_plain(e) for e in found.values()], file)
"""

PLAIN = """
if __name__ == "__main__":
    callbacks = [Spoil(), Told(), CounterfactualReplay(), SceneRecorder()]
    LightningCLI(Net, Data, trainer_defaults={"callbacks": callbacks})
"""

TRAINER = {
    "max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "gradient_clip_val": 1.0, "precision": "bf16-mixed",
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
}  # fmt: skip
SETTINGS = {
    "seed_everything": 1,
    "model": {"lr": 0.01, "dropout": 0.2, "width": 8},
    "data": {"batch_size": 32},
    "trainer": TRAINER,
}


def process(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-W", "ignore", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training by a script of the user's own, with a plain LightningCLI, that is over."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "train.py").write_text(textwrap.dedent(MODULE + PLAIN))
    (folder / "given.yaml").write_text(yaml.safe_dump(SETTINGS))
    done = process("train.py", "fit", "--config=given.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def _here(run, monkeypatch):
    """In the project's folder, with nothing of it left behind in this process."""
    monkeypatch.chdir(run)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", ["lightning-spike", "replay"])
    before = set(sys.modules)
    yield
    for name in {"train"} - before:
        sys.modules.pop(name, None)


def measured(folder):
    replay = json.loads((folder / "spike" / "replay.json").read_text())
    return [from_plain(Experiments, scene["experiments"]) for scene in with_nonfinite(replay)["scenes"]]


@pytest.mark.slow
def test_a_fresh_process_finds_what_the_training_found_to_the_bit(run):
    folder = run / "lightning_logs" / "version_0"
    done = process("-m", "lightning_spike.cli", "replay", str(folder), "--config", str(folder / "config.yaml"), cwd=run)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (live,) = [from_plain(Experiments, e) for e in json.loads((run / "live.json").read_text())]
    assert [repr(found) for found in measured(folder)] == [repr(live)]
    assert (split_verdict(live), live.replay.exact) == ("data", True)
    said = " ".join(done.stdout.split())
    assert "Episode 1: spike at step 84" in said
    assert "what made the loss jump: the batch" in said
    assert all(sentence in said for sentence in sentences.about(live))
    assert "notes" not in said


@pytest.mark.usefixtures("_here")
def test_the_config_beside_the_run_is_found_and_settings_can_be_changed(run, capsys):
    folder = run / "lightning_logs" / "version_0"
    assert main(["replay", str(folder / "spike"), "--episode=1", "--trainer.precision=32-true"]) == 0
    (found,) = measured(folder)
    assert not found.replay.exact, "another precision is another run"
    said = " ".join(capsys.readouterr().out.split())
    assert "is not exact" in said
    assert sentences.replay(found.replay) in said


@pytest.mark.usefixtures("_here")
def test_where_nothing_can_be_run_again_the_status_says_so(run, capsys, monkeypatch):
    def examine(scene):
        msg = "the module holds an open socket"
        raise CannotReplay(msg)

    monkeypatch.setattr("lightning_spike.replay.examine", examine)
    folder = run / "lightning_logs" / "version_0"
    assert main(["replay", str(folder)]) == 1
    assert "not replayed: the module holds an open socket" in capsys.readouterr().out
    assert measured(folder) == [Experiments(episode=1, not_run="the module holds an open socket")]


@pytest.mark.usefixtures("_here")
def test_a_folder_that_cannot_be_written_to_costs_only_the_file(run, capsys, monkeypatch):
    def write(report, path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("lightning_spike.cli.write_replay", write)
    assert main(["replay", str(run / "lightning_logs" / "version_0")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "what made the loss jump: the batch" in said
    assert "replay.json could not be written: [Errno 30] Read-only file system" in said
    assert "File:" not in said


REFUSED = {
    "no run": (
        ["nowhere"],
        r"replay(RUN_DIR): expected a folder with scenes in scenes or spike/scenes, was given 'nowhere'",
    ),
    "no episode": (["{run}", "--episode=7"], "replay(--episode): expected one of 1, was given 7"),
    "no config": (
        ["{run}", "--config=missing.yaml"],
        "replay(--config): expected a YAML file, was given 'missing.yaml'",
    ),
    "another module": (["{run}", "--model.width=16"], "net.0.weight of shape (8, 1, 3, 3)"),
    "another optimizer": (["{run}", "--model.optimizer=adamw"], "those of the run, SGD over"),
    "no module": (
        ["{run}", "--model.dropout=7"],
        "was given 'ValueError'. dropout probability has to be between 0 and 1",
    ),
    "no such option": (["{run}", "--model.wdth=3"], "wdth"),
    "no cli": (["{run}", "--cli=nowhere.MyCLI"], "nowhere:MyCLI cannot be imported here"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("_here")
def test_what_cannot_be_replayed_is_said_in_one_line(case, run, capsys):
    arguments, said = REFUSED[case]
    folder = str(run / "lightning_logs" / "version_0")
    assert main(["replay", *(a.format(run=folder) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("_here")
def test_a_script_that_would_train_on_import_is_stopped(run, capsys):
    text = (run / "train.py").read_text()
    (run / "train.py").write_text(text.replace('if __name__ == "__main__":', "if True:"))
    try:
        assert main(["replay", str(run / "lightning_logs" / "version_0")]) == 2
    finally:
        (run / "train.py").write_text(text)
    assert "trains as soon as it is imported" in capsys.readouterr().err
