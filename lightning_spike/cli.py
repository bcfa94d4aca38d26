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
        """Applies the options of `suite()` to its callbacks."""
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
        """The suite's callbacks without those whose class is given already."""
        spike = self._get(self.config_init, "spike")
        wanted = {type(c) for c in suite(rollback=spike["rollback"], replay=spike["replay"])}
        return [
            self._get(self.config_init, _key(kind))
            for kind in _kinds()
            if kind in wanted and not any(isinstance(c, kind) for c in callbacks)
        ]

    def _given(self) -> Any:
        """The parsed settings, of the subcommand if there is one."""
        return self.config if self.subcommand is None else self.config[self.subcommand]


def _kinds() -> list[type[Callback]]:
    """All classes of the suite."""
    return [type(callback) for callback in suite(rollback=True, replay=True)]


def _key(kind: type[Callback]) -> str:
    """A callback's key in the config: its class name in snake case, such as `lr_peak_detector`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script `lightning-spike`.

    Args:
        arguments: The arguments of the command; by default those of this process.

    Returns:
        The exit status. 1: a demo's report has another first cause, a package is missing, a report cannot be read, or
        no scene could be replayed. 2: there are no scenes, or the config is not the run's. 0: none of these.

    Raises:
        SystemExit: With status 2, for invalid arguments.
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
    """Builds the run's objects from its config and examines its scenes."""
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
    except Exception as error:  # from the user's module, data or trainer
        raise cannot_make(type(error).__name__, error) from error
    file = scenes[0].parent.parent / "replay.json"
    report = examiner.report(configs, file)
    try:
        write_replay(report, file)
    except OSError as error:  # a read-only folder: the report is printed anyway
        note = f"replay.json could not be written: {error}"
        return dataclasses.replace(report, file=None, notes=(*report.notes, note))
    return report


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences Lightning's messages about a training without batches."""
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
        help="train small models with a known fault and print their reports",
        description=f"Trainings with a known fault, each with its report:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [demo.name for demo in DEMOS]
    demo.add_argument(
        "names", nargs="*", metavar="name", choices=[*names, []], help="names of the demos (default: all)"
    )
    demo.add_argument("--out", type=Path, default=Path("runs"), help="folder for the reports (default: runs)")
    report = commands.add_parser(
        "report",
        help="print a run's report again",
        description="Print the report of a finished run again, from its files.",
    )
    report.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the run's dirpath, the folder above its spike/, or a report.json"
    )
    report.add_argument(
        "--rank-again",
        action="store_true",
        help="rank the causes again with this version, from report.json and signals/",
    )
    _add_replay(commands)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="examine the episodes of a finished run",
        description=(
            "Replay each episode from the scenes of a run and report why the loss jumped. Further arguments override "
            "the training's config, such as --trainer.accelerator=gpu; the default is the CPU. Exit status: 0 if an "
            "episode was examined, 1 if none could be replayed, 2 for no scenes or the config of another run."
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
        help="the run's config, repeated for several files (default: the config.yaml in RUN_DIR or above it)",
    )
    replay.add_argument("--episode", type=int, help="number of the episode (default: all with a scene)")
    replay.add_argument(
        "--cli", help="import path of your own LightningCLI class, if it adds arguments or links to the config"
    )


def _train(arguments: list[str]) -> None:
    SpikeCLI(args=arguments, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    sys.exit(main())
