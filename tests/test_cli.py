import contextlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import rich
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from training_tasks import Digits, build, spoilt_digits, train

from lightning_spike import GradNormMonitor, OverfitWatcher, RootCauseReport, SpikeCLI, suite
from lightning_spike.cli import main
from lightning_spike.demo.catalogue import DEMOS
from lightning_spike.demo.digits import DigitsData
from lightning_spike.demo.digits_cnn import DigitsCNN
from lightning_spike.errors import ConfigurationError
from lightning_spike.report import html

KEYS = {
    "ActivationMonitor": "activation_monitor",
    "AnomalyRollback": "anomaly_rollback",
    "BadBatchDumper": "bad_batch_dumper",
    "CounterfactualReplay": "counterfactual_replay",
    "DataMonitor": "data_monitor",
    "GradNormMonitor": "grad_norm_monitor",
    "LRPeakDetector": "lr_peak_detector",
    "OptimizerMonitor": "optimizer_monitor",
    "OverfitWatcher": "overfit_watcher",
    "PrecisionMonitor": "precision_monitor",
    "RankSyncMonitor": "rank_sync_monitor",
    "RootCauseReport": "root_cause_report",
    "SceneRecorder": "scene_recorder",
    "WeightMonitor": "weight_monitor",
}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])


def _built(*arguments, cli=SpikeCLI, **options):
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu"]
    return cli(
        DigitsCNN,
        DigitsData,
        args=[*quiet, *arguments],
        run=False,
        save_config_callback=None,
        seed_everything_default=1,
        **options,
    )


def _ours(cli):
    return {type(c).__name__: c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_spike.")}


def _settings(callback):
    return {name: value for name, value in vars(callback).items() if not name.startswith("_")}


SUITES = [
    {},
    {"rollback": True},
    {"early_stop": True},
    {"replay": False},
    {"dirpath": "here"},
    {"rollback": True, "early_stop": True, "replay": False, "dirpath": "here"},
]


@pytest.mark.parametrize("options", SUITES, ids=["+".join(o) or "nothing" for o in SUITES])
def test_the_options_of_suite_give_what_suite_gives(options):
    given = [f"--spike.{name}={json.dumps(value).strip(chr(34))}" for name, value in options.items()]
    expected = {type(c).__name__: _settings(c) for c in suite(**options)}
    assert {name: _settings(c) for name, c in _ours(_built(*given)).items()} == expected


def test_every_class_of_the_suite_has_its_own_key():
    parser = _built().parser
    assert set(KEYS) == {type(c).__name__ for c in suite(rollback=True)}
    groups = {action.dest.partition(".")[0] for action in parser._actions}
    assert set(KEYS.values()) <= groups


def test_settings_come_from_yaml_and_the_command_line_wins(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"overfit_watcher": {"patience": 4, "monitor": "val_error"}}))
    watcher = _ours(_built(f"--config={config}", "--overfit_watcher.patience=5"))["OverfitWatcher"]
    assert (watcher.patience, watcher.monitor) == (5, "val_error")


def test_a_folder_of_its_own_wins_over_the_suites():
    ours = _ours(_built("--spike.dirpath=all", "--bad_batch_dumper.dirpath=own"))
    assert Path(ours["BadBatchDumper"].dirpath) == Path("own")
    assert Path(ours["RootCauseReport"].dirpath) == Path("all")


def test_rollback_settings_alone_add_no_rollback():
    assert "AnomalyRollback" not in _ours(_built("--anomaly_rollback.every=10"))
    assert _ours(_built("--anomaly_rollback.every=10", "--spike.rollback=true"))["AnomalyRollback"].every == 10


def test_a_callback_of_the_trainer_takes_the_place_of_the_suites():
    cli = _built("--trainer.callbacks=lightning_spike.OverfitWatcher", "--trainer.callbacks.patience=9")
    watchers = [c for c in cli.trainer.callbacks if isinstance(c, OverfitWatcher)]
    assert [w.patience for w in watchers] == [9]
    assert set(_ours(cli)) == {type(c).__name__ for c in suite()}


def test_a_subclass_takes_the_place_too_and_others_are_kept():
    class Mine(GradNormMonitor):
        pass

    class Other(Callback):
        pass

    mine, other = Mine(), Other()
    monitors = _built(trainer_defaults={"callbacks": [other]}).instantiate_trainer(callbacks=[mine]).callbacks
    assert [c for c in monitors if isinstance(c, GradNormMonitor)] == [mine]
    assert other in monitors


def test_a_subclass_of_the_cli_has_add_arguments_for_itself():
    class Mine(SpikeCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_argument("--mine", default=3, type=int)

    cli = _built("--mine=4", cli=Mine)
    assert cli.config["mine"] == 4
    assert "GradNormMonitor" in _ours(cli)


MISSPELT = [
    ["--overfit_watcher.patince=5"],
    ["--overfit_wacher.patience=5"],
    ["--spike.rolback=true"],
    ["--trainer.callbacks=lightning_spike.GradNormMonitor", "--trainer.callbacks.per_layer=3"],
]


@pytest.mark.parametrize("given", MISSPELT, ids=[" ".join(g) for g in MISSPELT])
def test_misspelt_options_are_refused(given, capsys):
    with pytest.raises(SystemExit) as stop:
        _built(*given)
    assert stop.value.code == 2
    assert given[-1].split("=")[0].rpartition(".")[2] in capsys.readouterr().err


def test_misspelt_options_are_refused_by_a_plain_cli_too(capsys):
    given = ["--trainer.callbacks=lightning_spike.OverfitWatcher", "--trainer.callbacks.patince=3"]
    with pytest.raises(SystemExit):
        _built(*given, cli=LightningCLI)
    assert "patince" in capsys.readouterr().err


def test_a_value_out_of_range_says_what_to_do():
    with pytest.raises(
        ConfigurationError, match=r"OverfitWatcher\(patience\): expected a whole number >= 1, was given 0"
    ):
        _built("--overfit_watcher.patience=0")


def test_plain_cli_takes_every_callback_by_its_short_path():
    given = [f"--trainer.callbacks+=lightning_spike.{name}" for name in KEYS]
    assert set(_ours(_built(*given, cli=LightningCLI))) == set(KEYS)


def test_help_shows_each_option_with_its_words(capsys):
    with pytest.raises(SystemExit) as stop:
        _built("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--overfit_watcher.patience PATIENCE Overfitted validations in a row" in text
    assert "--spike.rollback {true,false} Heal the run" in text


def test_what_is_saved_builds_the_same_suite_again(tmp_path):
    first = _built("--spike.rollback=true", "--anomaly_rollback.every=7", "--spike.early_stop=true")
    saved = tmp_path / "saved.yaml"
    saved.write_text(first.parser.dump(first.config))
    again = _built(f"--config={saved}")
    assert {n: _settings(c) for n, c in _ours(again).items()} == {n: _settings(c) for n, c in _ours(first).items()}


def test_without_jsonargparse_the_package_imports_and_the_cli_says_what_is_missing():
    """In a process of its own, to which it looks as if the extra had never been installed."""
    script = """
        import importlib.metadata
        import sys

        there = importlib.metadata.distribution

        def distribution(name):
            if name == "jsonargparse":
                raise importlib.metadata.PackageNotFoundError(name)
            return there(name)

        importlib.metadata.distribution = distribution
        sys.modules["jsonargparse"] = None  # what the import system then says is: no such module

        from lightning_spike import SpikeCLI
        from lightning_spike.errors import MissingExtraError

        try:
            SpikeCLI()
        except MissingExtraError as error:
            print(error)
    """
    done = subprocess.run(  # noqa: S603 - this very Python
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert "pip install 'lightning-spike[cli]'" in done.stdout


@pytest.fixture
def reported(monkeypatch):
    """Let the demos be trained by a stand-in, which writes a report with the given first cause."""

    def with_causes(causes):
        def train(arguments):
            folder = Path(dict(a.removeprefix("--").split("=") for a in arguments[1:])["spike.dirpath"])
            folder.mkdir(parents=True, exist_ok=True)
            name = folder.name
            found = [{"cause": causes[name]}] if causes.get(name) else []
            report = {"schema_version": 1, "run": {}, "episodes": [], "causes": found, "actions": []}
            (folder / "report.json").write_text(json.dumps(report))

        monkeypatch.setattr("lightning_spike.cli._train", train)

    return with_causes


def test_demo_ends_with_a_line_for_each_and_status_zero(reported, tmp_path, capsys):
    reported({demo.name: demo.expected for demo in DEMOS})
    assert main(["demo", f"--out={tmp_path}"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-len(DEMOS) :]
    for line, demo in zip(last, DEMOS, strict=True):
        assert f"{demo.name:<16} {demo.expected} first, as expected" in line
        assert str(tmp_path / demo.name) in line


@pytest.mark.parametrize("first", ["hardware_fault", None])
def test_demo_fails_where_another_cause_comes_first(reported, tmp_path, capsys, first):
    reported({demo.name: demo.expected for demo in DEMOS} | {"bytes_corrupt": first})
    assert main(["demo", f"--out={tmp_path}"]) == 1
    assert f"{first or 'no cause'} first, expected bad_batch" in capsys.readouterr().out


def test_demo_by_name_runs_only_that_one(reported, tmp_path):
    reported({"digits_overfit": "overfitting"})
    assert main(["demo", "digits_overfit", f"--out={tmp_path}"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["digits_overfit"]


def test_a_report_of_an_earlier_run_does_not_count(monkeypatch, reported, tmp_path, capsys):
    reported({demo.name: demo.expected for demo in DEMOS})
    assert main(["demo", f"--out={tmp_path}"]) == 0
    monkeypatch.setattr("lightning_spike.cli._train", lambda arguments: None)
    assert main(["demo", f"--out={tmp_path}"]) == 1
    assert "report.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["demos"], ["demo", "digits"], ["report"]], ids=["none", "no command", "no demo", "no run"]
)
def test_wrong_arguments_of_the_script_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: lightning-spike" in capsys.readouterr().err


@pytest.fixture
def at_80_columns(monkeypatch):
    """The console that rich gives everybody, in a terminal of 80 columns."""
    monkeypatch.setattr(rich, "_console", Console(width=80))


def _poison(trainer, module):
    with torch.no_grad():
        module.net[-1].weight.fill_(float("nan"))


class At(Callback):
    """Does something to the training at the end of one batch."""

    def __init__(self, batch, what):
        self.batch, self.what, self.seen = batch, what, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen == self.batch:
            self.what(trainer, pl_module)


def _fail(trainer, module):
    raise ZeroDivisionError


def _quick():
    """Without the page, which takes a second to draw."""
    return RootCauseReport(formats=["terminal", "json", "signals"])


RUNS = {
    "healthy": lambda root: train(Digits(), [RootCauseReport()], root, validate=True),
    "stopped": lambda root: train(
        Digits(), [_quick(), At(5, lambda trainer, _: setattr(trainer, "should_stop", True))], root, min_epochs=0
    ),
    "nonfinite": lambda root: train(Digits(), [RootCauseReport(), At(30, _poison)], root, validate=True),
    "accumulated": lambda root: train(Digits(), [_quick(), At(30, _poison)], root, accumulate_grad_batches=3),
    "exception": lambda root: train(Digits(), [_quick(), At(30, _poison), At(33, _fail)], root),
    "suite": lambda root: train(build("two_by_hand")[0], suite(), root, dataset=spoilt_digits(), max_epochs=3),
}
EPISODES = {"healthy": False, "stopped": False}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.usefixtures("at_80_columns")
def test_report_prints_what_the_run_printed(run, tmp_path, capsys):
    with contextlib.suppress(ZeroDivisionError):
        RUNS[run](tmp_path)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert ("episode" in printed) == EPISODES.get(run, True)
    for place in (tmp_path, tmp_path / "spike", tmp_path / "spike" / "report.json"):
        assert main(["report", str(place)]) == 0
        assert capsys.readouterr() == (printed, "")


@pytest.mark.parametrize("run", ["nonfinite", "suite"])
@pytest.mark.usefixtures("at_80_columns")
def test_the_same_version_ranks_a_run_again_as_it_did(run, tmp_path, capsys):
    RUNS[run](tmp_path)
    printed = capsys.readouterr().out
    assert main(["report", str(tmp_path), "--rank-again"]) == 0
    assert capsys.readouterr() == (printed, "")


@pytest.mark.usefixtures("at_80_columns")
def test_a_run_without_signals_cannot_be_ranked_again(tmp_path, capsys):
    train(Digits(), [RootCauseReport(formats=["json"]), At(30, _poison)], tmp_path)
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--rank-again"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rank again: expected the signals/ of the run beside its report.json, found none.")


@pytest.mark.usefixtures("at_80_columns")
def test_report_repeats_what_could_not_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None)
    train(Digits(), [RootCauseReport()], tmp_path, max_epochs=1)
    printed = capsys.readouterr().out
    assert "pip install" in printed
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.usefixtures("at_80_columns")
def test_report_without_signals_has_no_curves_and_says_the_rest(tmp_path, capsys):
    train(Digits(), [RootCauseReport(formats=["terminal", "json"]), At(30, _poison)], tmp_path)
    with_curve = capsys.readouterr().out.splitlines()
    assert main(["report", str(tmp_path)]) == 0
    without = capsys.readouterr().out.splitlines()
    missing = [line for line in with_curve if line not in without]
    assert missing[0].startswith("loss")
    assert [line for line in with_curve if line in without and line] == [line for line in without if line]


def _of_another_schema(path):
    path.write_text(json.dumps({"schema_version": 2}))


UNREADABLE = {
    "missing": (lambda path: path.parent.rmdir(), "found nothing of that name. Give"),
    "no report": (lambda path: None, "found a folder with neither. Give"),
    "broken": (lambda path: path.write_text('{"schema_version": 1, '), "found what cannot be read"),
    "another schema": (_of_another_schema, "expected schema_version 1, found 2. Read it with"),
    "no object": (lambda path: path.write_text("[]"), "expected schema_version 1, found None. Read it with"),
    "a folder of that name": (lambda path: path.mkdir(), "found a folder with neither. Give"),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_report_says_in_one_line_what_is_wrong(how, tmp_path, capsys):
    spoil, said = UNREADABLE[how]
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder / "report.json")
    assert main(["report", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(str(folder))
    assert ": expected " in err
    assert said in err


def test_report_of_a_file_that_is_no_text_is_refused(tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\x00")
    assert main(["report", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
