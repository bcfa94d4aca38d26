"""Examines the scenes of a finished run, in a training that ends before its first batch."""

import contextlib
import dataclasses
import importlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_spike.actions.dump_facts import package_versions
from lightning_spike.errors import CannotReplay, ConfigurationError
from lightning_spike.experiments import Experiments
from lightning_spike.lab.encoding import find_class
from lightning_spike.lab.examine import examine
from lightning_spike.lab.scene_files import find_scenes, read_manifest, read_scene
from lightning_spike.report.replayed import Replayed, ReplayReport

PLACES: Final = ("scenes", "spike/scenes")
"""Folder of the scenes, in the recorder's `dirpath` and in the folder above the default one."""
CONFIGS: Final = ("config.yaml", "../config.yaml")
"""Paths of LightningCLI's config, relative to the log_dir and to the default `dirpath` in it."""
DEFAULTS: Final = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
)
"""Default options: a single process on the CPU; the command line overrides them."""
QUIET: Final = {
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "barebones": False,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "limit_train_batches": 1.0,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "use_distributed_sampler": False,
    "max_time": None,
}
"""Trainer settings for a replay, which draws no data, writes nothing and runs no callbacks."""
COMPARED_PACKAGES: Final = ("torch", "lightning", "lightning-spike")
"""Packages whose version may change the result."""


def scenes_of(run_dir: Path, episode: int | None = None) -> list[Path]:
    """Returns the scenes of a run.

    Args:
        run_dir: The recorder's `dirpath`, or the folder above it where that is called `spike`.
        episode: Only the scene of this episode.

    Raises:
        ConfigurationError: There is no scene, or none of this episode.
    """
    places = next((found for name in PLACES if (found := find_scenes(run_dir / name))), [])
    if not places:
        raise ConfigurationError.of(
            "replay(RUN_DIR)",
            expected=f"a folder with scenes in {' or '.join(PLACES)}",
            given=str(run_dir),
            do="Add SceneRecorder to the callbacks: it writes a scene for every spike, divergence and non-finite loss.",
        )
    episodes = {read_manifest(place)["episode"]["id"]: place for place in places}
    if episode is None:
        return list(episodes.values())
    if episode not in episodes:
        raise ConfigurationError.of(
            "replay(--episode)",
            expected=f"one of {', '.join(map(str, episodes))}",
            given=episode,
            do="Leave it out for all of them.",
        )
    return [episodes[episode]]


def find_config(run_dir: Path) -> Path:
    """Returns the config that LightningCLI wrote beside the run's files.

    Raises:
        ConfigurationError: There is no config.
    """
    found = next((run_dir / name for name in CONFIGS if (run_dir / name).is_file()), None)
    if found is None:
        raise ConfigurationError.of(
            "replay(--config)",
            expected=f"the config of the run, or a config.yaml in {run_dir} or above it",
            given=None,
            do="Give it with --config: the file that the training was started with.",
        )
    return found


def cannot_make(what: str, said: object) -> ConfigurationError:
    """The error for a config from which the run's objects cannot be built."""
    return ConfigurationError.of(
        "replay(--config)",
        expected="a config that the run's module, data and trainer can be made from",
        given=what,
        do=f"{said}. Give the config of the run, and --cli with its own LightningCLI class where that adds to it.",
    )


# -- the module, as the run had it -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Makers:
    """Classes for building the objects of a run from its config."""

    model: type[LightningModule] | None
    """`None` if the config names the class."""
    data: type[LightningDataModule] | None
    batches_per_epoch: int | None

    @classmethod
    def of(cls, scene: Path, configs: Sequence[Path]) -> "Makers":
        """Returns those of a scene's run, from the working directory or the folder of its script.

        Raises:
            CannotReplay: A class cannot be imported.
            ConfigurationError: A config cannot be read.
        """
        manifest = read_manifest(scene)
        for folder in (manifest["script_folder"], ""):
            if folder is not None and folder not in sys.path:
                sys.path.insert(0, folder)
        named = _named_in(configs)
        with _nothing_trains():
            model = None if "model" in named else find_class(manifest["module"])
            known = manifest["datamodule"] is not None and "data" not in named
            data = find_class(manifest["datamodule"]) if known else None
            if manifest["script_folder"] is not None and any("__main__." in path.read_text() for path in configs):
                _as_main(manifest["module"].partition(":")[0])
        return cls(model=model, data=data, batches_per_epoch=manifest["run"]["batches_per_epoch"])


def _named_in(configs: Sequence[Path]) -> set[str]:
    """Those of `model` and `data` whose class a config names."""
    named = set()
    for path in configs:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigurationError.of(
                "replay(--config)", expected="a YAML file", given=str(path), do=f"It cannot be read: {error}"
            ) from error
        content = content if isinstance(content, dict) else {}
        named |= {key for key in ("model", "data") if "class_path" in (content.get(key) or {})}
    return named


def _as_main(module: str) -> None:
    """Adds a script's classes to `__main__`, where its config has them."""
    main = sys.modules["__main__"]
    for name, value in vars(importlib.import_module(module)).items():
        if isinstance(value, type) and not hasattr(main, name):
            setattr(main, name, value)


@contextlib.contextmanager
def _nothing_trains() -> Iterator[None]:
    """Makes a script raise if it trains on import."""

    def refuse(*_: object, **__: object) -> NoReturn:
        msg = 'the script trains as soon as it is imported: put its last lines under `if __name__ == "__main__":`'
        raise CannotReplay(msg)

    places: list[tuple[type, str]] = [(LightningCLI, "__init__"), (Trainer, "fit")]
    kept = [getattr(kind, name) for kind, name in places]
    try:
        for kind, name in places:
            setattr(kind, name, refuse)
        yield
    finally:
        for (kind, name), original in zip(places, kept, strict=True):
            setattr(kind, name, original)


# -- the training that ends before its first batch ---------------------------------------------------------------------


class _Examined(Exception):  # noqa: N818 - no error: the way out of a fit that has done what it was for
    """Ends the fit after all scenes were examined."""


class Examiner(Callback):
    """Examines scenes when everything is set up for a training, and ends it there.

    Args:
        scenes: Where they are.
    """

    def __init__(self, scenes: Sequence[Path]) -> None:
        self.scenes = tuple(scenes)
        self.replayed: list[Replayed] = []
        """The results, one per scene."""
        self.device = "cpu"
        self.notes: list[str] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.on_train_epoch_start()  # Lightning would call it now; what it makes, `training_step` may need
        self.device = trainer.strategy.root_device.type
        for place in self.scenes:
            self._note_differences(read_manifest(place))
            self.replayed.append(_replayed(place, trainer, pl_module))
        raise _Examined

    def report(self, configs: Sequence[Path], file: Path | None = None) -> ReplayReport:
        """Returns the results."""
        notes = tuple(dict.fromkeys(self.notes))
        return ReplayReport(scenes=self.replayed, device=self.device, configs=configs, notes=notes, file=file)

    def _note_differences(self, manifest: dict[str, Any]) -> None:
        here = package_versions()
        for name in COMPARED_PACKAGES:
            there = manifest["versions"].get(name)
            if there != here.get(name):
                self.notes.append(f"The run had {name} {there}, here it is {here.get(name)}: numbers may differ.")
        if manifest["device"] != self.device:
            there = manifest["device"]
            self.notes.append(f"The run was on {there}, this is {self.device}: random numbers and last digits differ.")


def _replayed(place: Path, trainer: Trainer, module: LightningModule) -> Replayed:
    scene = read_scene(place, trainer, module)
    began = time.monotonic()
    try:
        found = examine(scene)
    except CannotReplay as reason:
        found = Experiments(episode=scene.episode.id, not_run=str(reason))
    except Exception as error:  # noqa: BLE001 - the user's code: what it raises is the answer
        found = Experiments(episode=scene.episode.id, not_run=f"the replay failed: {type(error).__name__}: {error}")
    return Replayed(
        place=place,
        started=read_manifest(place)["run"]["started"],
        episode=scene.episode,
        experiments=found,
        seconds=time.monotonic() - began,
    )


class ReplayingCLI(LightningCLI):
    """A LightningCLI that builds a run's module, data and trainer, and examines scenes instead of training.

    Mixed into the run's own kind of CLI. No logger, no callbacks, no checkpoints; the data module is set up, and no
    data are drawn from it.

    Args:
        args: As of the CLI that it is mixed into.
        examiner: Who examines.
        batches_per_epoch: As in the run, for schedulers that ask for it; `None` for a loader without a length.
        kwargs: As of the CLI that it is mixed into.
    """

    def __init__(self, *args: Any, examiner: Examiner, batches_per_epoch: int | None, **kwargs: Any) -> None:
        self._examiner = examiner
        self._loader = _NoData() if batches_per_epoch is None else _Length(batches_per_epoch)
        super().__init__(*args, **kwargs)

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses the arguments and raises the parser's message as our error instead of exiting."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                super().parse_arguments(parser, args)
        except SystemExit as stop:
            *_, complaint = said.getvalue().partition("error: ")
            misfit = cannot_make("options that do not fit", " ".join(complaint.split()))
            raise misfit from stop

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config[self.subcommand]["trainer"]
        for name, value in QUIET.items():
            if name in trainer:
                trainer[name] = value

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = {**self._get(self.config_init, "trainer")}
        # A logger that takes everything and keeps nothing: `self.logger.experiment` may be written to.
        trainer: Trainer = self.trainer_class(**given | {"logger": DummyLogger(), "callbacks": [self._examiner]})
        return trainer

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """In place of the training."""
        self.model.configure_callbacks = list
        data: dict[str, Any] = {"train_dataloaders": self._loader}
        if self.datamodule is not None:
            self.datamodule.train_dataloader = lambda: self._loader
            data = {"datamodule": self.datamodule}
        with contextlib.suppress(_Examined):
            self.trainer.fit(self.model, **data)


class _NoData:
    """Stands in for the training data: nothing is drawn from it."""

    def __iter__(self) -> Iterator[None]:
        return iter(())


class _Length(_NoData):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length
