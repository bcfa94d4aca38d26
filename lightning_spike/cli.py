"""The command line: `SpikeCLI` for a training of your own, and the console script `lightning-spike`.

```python
from lightning_spike import SpikeCLI

SpikeCLI(MyModule, MyDataModule)  # python train.py fit --config config.yaml --overfit_watcher.patience 5
```
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import rich
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_spike.callbacks.suite import suite
from lightning_spike.demo.catalogue import DEMOS
from lightning_spike.demo.show import show
from lightning_spike.errors import MissingExtraError, SpikeError, UnreadableReportError
from lightning_spike.lab.encoding import find_class
from lightning_spike.replay import DEFAULTS, Examiner, Makers, ReplayingCLI, cannot_make, find_config, scenes_of
from lightning_spike.report.read_back import read_back
from lightning_spike.report.replayed import ReplayReport, write_replay

_DESCRIPTION: Final = "Lightning callbacks that catch a loss spike and say what caused it."


class SpikeCLI(LightningCLI):
    """A LightningCLI that has the whole suite built in.

    Each callback's settings stand under its own key (`grad_norm_monitor`, `overfit_watcher`, …), and the options of
    `suite()` under `spike`, in the YAML and on the command line. `spike.rollback: true` adds `anomaly_rollback`,
    `spike.replay: false` leaves `counterfactual_replay` out; otherwise the settings of these two say only how, not
    whether. `spike.early_stop: true` sets `stop` and `restore_best` of `overfit_watcher`, and `spike.dirpath` is the
    folder of every callback that is given none of its own. A callback under `trainer.callbacks` takes the place of the
    suite's one of its class, settings and all.

    Takes the arguments of `LightningCLI`.

    Raises:
        MissingExtraError: The extra `cli` is not installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for package in ("jsonargparse", "docstring_parser", "typeshed_client"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError.of("SpikeCLI", extra="cli", package=package)
        super().__init__(*args, **kwargs)

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the suite beside trainer, model and data; `add_arguments_to_parser` stays free for your own."""
        super().add_core_arguments_to_parser(parser)
        parser.add_function_arguments(suite, "spike")
        for kind in _kinds():
            parser.add_class_arguments(kind, _key(kind))

    @override
    def before_instantiate_classes(self) -> None:
        """Let the options of `suite()` reach the callbacks that they are about."""
        config = self._given()
        spike = config["spike"]
        for key in map(_key, _kinds()):
            if spike["dirpath"] is not None and "dirpath" in config[key] and config[key]["dirpath"] is None:
                config[key]["dirpath"] = spike["dirpath"]
        if spike["early_stop"]:
            config["overfit_watcher"]["stop"] = config["overfit_watcher"]["restore_best"] = True

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer with the callbacks of `trainer.callbacks`, then the suite's."""
        given = kwargs.pop("callbacks", self._get(self.config_init, "trainer")["callbacks"])
        callbacks: list[Callback] = [given] if isinstance(given, Callback) else list(given or [])
        return super().instantiate_trainer(callbacks=callbacks + self._suite_beside(callbacks), **kwargs)

    def _suite_beside(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """The suite's callbacks, but for those whose class is there already."""
        spike = self._get(self.config_init, "spike")
        wanted = {type(c) for c in suite(rollback=spike["rollback"], replay=spike["replay"])}
        return [
            self._get(self.config_init, _key(kind))
            for kind in _kinds()
            if kind in wanted and not any(isinstance(c, kind) for c in callbacks)
        ]

    def _given(self) -> Any:
        """The settings as parsed, of the subcommand where there is one."""
        return self.config if self.subcommand is None else self.config[self.subcommand]


def _kinds() -> list[type[Callback]]:
    """Every class that the suite can hold."""
    return [type(callback) for callback in suite(rollback=True, replay=True)]


def _key(kind: type[Callback]) -> str:
    """Where a callback's settings stand: its class name in snake case, `LRPeakDetector` as `lr_peak_detector`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script `lightning-spike`.

    Args:
        arguments: What stands behind the command; by default that of this process.

    Returns:
        The exit status: 0 where all went well, 1 where a demo's report does not put the right cause first, a package is
        missing, a report cannot be read, or no scene could be run again, 2 where there is nothing to replay or the
        config is not that of the run.

    Raises:
        SystemExit: With status 2, for arguments that are none.
    """
    parser = _parser()
    given, more = parser.parse_known_args(arguments)
    if given.command == "replay":
        return _replay(given, more)
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return _report(given.run_dir, again=given.rank_again) if given.command == "report" else _demo(given)


def _report(place: Path, *, again: bool) -> int:
    try:
        rich.get_console().print(read_back(place, again=again))
    except UnreadableReportError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's error, bare for the programs that read it
        return 1
    return 0


def _replay(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    try:
        scenes = scenes_of(given.run_dir, given.episode)
        configs = given.config or [find_config(given.run_dir)]
        report = _examined(scenes, configs, overrides, given.cli)
        rich.get_console().print(report)
    except SpikeError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's error, bare for the programs that read it
        return 2
    return 0 if any(scene.examined for scene in report.scenes) else 1


def _examined(
    scenes: Sequence[Path], configs: Sequence[Path], overrides: Sequence[str], cli: str | None
) -> ReplayReport:
    """Build the run anew from its config, and examine its scenes in it."""
    examiner, makers = Examiner(scenes), Makers.of(scenes[0], configs)
    base = SpikeCLI if cli is None else find_class(":".join(cli.replace(":", ".").rsplit(".", 1)))
    kind = type("Replay", (ReplayingCLI, base), {})
    try:
        with _quietly():
            kind(
                makers.model,
                makers.data,
                examiner=examiner,
                batches_per_epoch=makers.batches_per_epoch,
                save_config_callback=None,
                args=["fit", *(f"--config={path}" for path in configs), *DEFAULTS, *overrides],
            )
    except SpikeError:
        raise
    except Exception as error:  # what the user's module, data or trainer have against the config
        raise cannot_make(type(error).__name__, error) from error
    file = scenes[0].parent.parent / "replay.json"
    report = examiner.report(configs, file)
    try:
        write_replay(report, file)
    except OSError as error:  # a folder that is not ours to write to: what was found is printed all the same
        note = f"replay.json could not be written: {error}"
        return dataclasses.replace(report, file=None, notes=(*report.notes, note))
    return report


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what Lightning says about a training that is none."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _demo(given: argparse.Namespace) -> int:
    demos = [demo for demo in DEMOS if demo.name in given.names] if given.names else DEMOS
    try:
        outcomes = show(demos, given.out, _train, rich.get_console())
    except SpikeError as error:
        rich.get_console().print(str(error), style="red", markup=False)
        return 1
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-spike", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = "\n".join(f"  {demo.name:<16} {demo.title}" for demo in DEMOS)
    demo = commands.add_parser(
        "demo",
        help="train on real data, see it go wrong, and read why",
        description=f"Real trainings that go wrong, each with its report:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [demo.name for demo in DEMOS]
    demo.add_argument("names", nargs="*", metavar="name", choices=[*names, []], help="which of them; all by default")
    demo.add_argument("--out", type=Path, default=Path("runs"), help="folder for the reports (default: runs)")
    report = commands.add_parser(
        "report",
        help="print a run's report again",
        description="Print the report again that a run printed when it ended, from the files that it wrote.",
    )
    report.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the run's dirpath, the folder above its spike/, or a report.json"
    )
    report.add_argument(
        "--rank-again",
        action="store_true",
        help="rank the causes again with this version's knowledge, from report.json and signals/",
    )
    _add_replay(commands)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="examine a run's episodes after the fact",
        description=(
            "Run the moment of each episode again, from the scenes that the run wrote, and say what made the loss jump. Further arguments are those of the training's "
            "own command line and change its config: --trainer.accelerator=gpu. On the CPU unless that is given. Exit status: 0 where something was examined, "
            "1 where nothing could be run again, 2 where there is nothing to replay or the config is not that of the run."
        ),
        allow_abbrev=False,
    )
    replay.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the run's dirpath, or the folder above its spike/"
    )
    replay.add_argument(
        "--config",
        type=Path,
        action="append",
        help="the config that the run was started with, as often as there are files; by default the config.yaml in RUN_DIR or above it",
    )
    replay.add_argument("--episode", type=int, help="only this one; by default all that have a scene")
    replay.add_argument(
        "--cli", help="import path of your own LightningCLI class, where it adds arguments or links to the config"
    )


def _train(arguments: list[str]) -> None:
    SpikeCLI(args=arguments, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    sys.exit(main())
