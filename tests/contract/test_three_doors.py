"""The same run through each of the three doors, Python, plain LightningCLI and SpikeCLI, gives the same report."""

import json

import pytest
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI

from lightning_spike import RootCauseReport, SpikeCLI, suite
from lightning_spike.demo.digits import DigitsData
from lightning_spike.demo.digits_cnn import DigitsCNN

MODEL = {"batch_norm": False, "momentum": 0.0, "lr": 0.65, "restart_every": 161}
TRAINER = {
    "max_epochs": 10,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
FORMATS = ["terminal", "json"]


def through_python(folder):
    seed_everything(1, workers=True, verbose=False)
    callbacks = suite(RootCauseReport(dirpath=folder, formats=FORMATS), dirpath=folder, replay=False)
    Trainer(**TRAINER, callbacks=callbacks).fit(DigitsCNN(**MODEL), DigitsData())


def through_lightning_cli(folder):
    report = {
        "class_path": "lightning_spike.RootCauseReport",
        "init_args": {"dirpath": str(folder), "formats": FORMATS},
    }
    dumper = {"class_path": "lightning_spike.BadBatchDumper", "init_args": {"dirpath": str(folder)}}
    written = ("RootCauseReport", "BadBatchDumper")
    names = [type(c).__name__ for c in reversed(suite(replay=False)) if type(c).__name__ not in written]
    callbacks = [report, dumper, *({"class_path": f"lightning_spike.{name}"} for name in names)]
    run(LightningCLI, folder, {"trainer": TRAINER | {"callbacks": callbacks}})


def through_spike_cli(folder):
    settings = {"trainer": TRAINER, "spike": {"dirpath": str(folder), "replay": False}}
    run(SpikeCLI, folder, settings | {"root_cause_report": {"formats": FORMATS}})


def run(kind, folder, settings):
    settings |= {"seed_everything": 1, "model": MODEL}
    (folder.parent / f"{folder.name}.yaml").write_text(yaml.safe_dump(settings))
    config = str(folder.parent / f"{folder.name}.yaml")
    kind(DigitsCNN, DigitsData, args=["fit", "--config", config], save_config_kwargs={"overwrite": True})


def told(folder):
    report = json.loads((folder / "report.json").read_text())
    for volatile in ("seconds", "started"):
        report["run"].pop(volatile)
    report["recorded"]["facts"].pop("started")
    return report


@pytest.mark.slow
def test_the_report_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    folders = []
    for door in (through_python, through_lightning_cli, through_spike_cli):
        folders.append(tmp_path / door.__name__)
        door(folders[-1])
    first, *others = map(told, folders)
    assert first["episodes"], "nothing happened, so nothing was compared"
    assert all(other == first for other in others)
