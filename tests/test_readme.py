"""Every code block of the README, then of docs/, is run, in order, in one folder, as a reader would run them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_spike import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
SHORT = {
    "max_epochs": 1,
    "limit_train_batches": 3,
    "limit_val_batches": 1,
    "logger": False,
    "enable_progress_bar": False,
}


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def test_the_readme_fits_on_few_screens_and_no_line_of_the_documentation_is_too_long():
    lines = {page.name: page.read_text().splitlines() for page in PAGES}
    assert len(lines["README.md"]) <= 160
    assert not [line for page in lines.values() for line in page if len(line) > 120]


def test_only_languages_that_are_run_or_are_output():
    assert {kind for kind, _ in BLOCKS} <= {"python", "yaml", "bash", "text"}


@pytest.mark.slow
def test_the_python_blocks_run_and_find_what_the_readme_says(tmp_path):
    """In a process of its own, on one thread, with the package as installed.

    The report that is shown is the one that comes out.
    """
    script = "\n".join(blocks("python"))
    (tmp_path / "readme.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = next(text for text in blocks("text") if "most likely" in text)
    headline = re.search(r"most likely (\w+)", shown).group(1)
    assert f"most likely {headline}" in done.stdout


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_yaml_blocks_are_accepted_and_train(text, tmp_path, monkeypatch):
    """A block with callbacks by class_path goes to plain LightningCLI, one with the callbacks' own keys to SpikeCLI."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    settings = yaml.safe_load(text)
    settings["trainer"] = settings.get("trainer", {}) | SHORT
    settings.setdefault("seed_everything", 1)
    settings.setdefault("model", {"class_path": "lightning_spike.demo.digits_cnn.DigitsCNN"})
    settings.setdefault("data", {"class_path": "lightning_spike.demo.digits.DigitsData"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    kind = LightningCLI if "callbacks" in settings["trainer"] else cli.SpikeCLI
    made = kind(args=["fit", "--config", "config.yaml"], save_config_kwargs={"overwrite": True})
    assert made.trainer.state.finished


def commands():
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_the_commands_exist(command, tmp_path):
    """`make` targets by a dry run (this test is run by one of them), pip's by their extras, ours by their own help,
    benchmarks by their options."""
    words = shlex.split(command)
    if words[0] == "make":
        command = ["make", "-n", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip":
        wanted = set(re.search(r"\[(.*)\]", command).group(1).split(","))
        assert wanted <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    elif words[0] == "lightning-spike":
        with pytest.raises(SystemExit) as left:
            cli.main([words[1], "--help"])
        assert left.value.code == 0
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))
    elif words[0] == "python":
        script = tmp_path / words[1]
        script.write_text("from lightning_spike import SpikeCLI\n\nSpikeCLI()\n")
        done = subprocess.run(  # noqa: S603 - our own README
            [sys.executable, str(script), *words[2:], *short_options()], cwd=tmp_path, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        pytest.fail(f"the documentation has a command that no test runs: {command}")


def short_options():
    model = ["--model", "lightning_spike.demo.digits_cnn.DigitsCNN", "--data", "lightning_spike.demo.digits.DigitsData"]
    return [*model, *(f"--trainer.{name}={value}" for name, value in SHORT.items())]
