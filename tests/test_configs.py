"""Every YAML in `configs/` trains, for real, with the command line that its first lines name.

And none has fallen behind the code.
"""

import inspect
import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_spike
from lightning_spike import SpikeCLI, suite
from lightning_spike.demo.catalogue import DEMOS, configs_folder

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
OF_PLAIN_CLI = {"minimal.yaml", "full.yaml"}


@pytest.fixture
def fit(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["train.py"])

    def run(config, *more):
        cli = LightningCLI if config.name in OF_PLAIN_CLI else SpikeCLI
        few = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2"]
        quiet = [
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
        ]
        where = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
        return cli(args=["fit", f"--config={config}", *few, *quiet, *where, *more])

    return run


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_it_trains_and_reports(fit, config, tmp_path):
    fit(config)
    report = json.loads((tmp_path / "spike" / "report.json").read_text())
    assert report["run"]["status"] == "finished"
    assert report["run"]["steps"] == 8
    assert report["disabled"] == []


def test_full_yaml_names_every_callback_and_every_option_at_its_default():
    given = yaml.safe_load((FOLDER / "full.yaml").read_text())["trainer"]["callbacks"]
    of_yaml = {entry["class_path"].rpartition(".")[2]: entry.get("init_args", {}) for entry in given}
    of_code = {}
    for kind in map(type, suite(rollback=True, replay=True)):
        options = inspect.signature(kind.__init__).parameters.values()
        of_code[kind.__name__] = {o.name: o.default for o in options if o.name != "self"}
    as_yaml = json.loads(json.dumps(of_code))
    assert of_yaml == as_yaml


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_class_paths_of_callbacks_are_the_short_ones(config):
    callbacks = yaml.safe_load(config.read_text())["trainer"].get("callbacks", [])
    for entry in callbacks:
        package, _, name = entry["class_path"].rpartition(".")
        assert package == "lightning_spike"
        assert name in lightning_spike.__all__


def test_each_demo_has_its_config_and_each_demo_config_its_demo():
    assert {demo.config for demo in DEMOS} == set(FOLDER.glob("demo_*.yaml"))
    assert configs_folder() == FOLDER
