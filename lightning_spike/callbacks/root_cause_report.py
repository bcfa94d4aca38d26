"""`RootCauseReport`: prints and writes the ranked root causes at the end of the run."""

import functools
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

import rich
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import directory
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.errors import ConfigurationError, MissingExtraError
from lightning_spike.flight.warn import warn
from lightning_spike.records import RunStatus
from lightning_spike.report.json_file import write_report
from lightning_spike.report.model import Report, build_report
from lightning_spike.report.signals_file import write_signals
from lightning_spike.report.terminal import TerminalReport

Format = Literal["terminal", "json", "html", "signals"]

BESIDE: Final[Mapping[Format, str]] = MappingProxyType({"signals": "signals", "html": "report.html"})
"""File name of each format written beside report.json, in the order of writing."""


class RootCauseReport(SpikeCallback):
    """Prints and writes the ranked root causes when training finishes, stops early, raises or is interrupted.

    A healthy run gives one line. The callback works alone; the other callbacks of the suite improve the ranking. Rank 0
    prints and writes. A run that ended before its first batch gives no report. Afterwards `report` holds the report on
    every rank. An error while writing is named in the terminal and never reaches the training; an exception of the
    training passes through.

    Args:
        dirpath: Folder for `report.json`, `report.html` and `signals/`; by default `<logger.log_dir, else
            trainer.default_root_dir>/spike`. Files of an earlier run are replaced.
        formats: Formats of the report: `terminal` (printed), `json`, `html` (needs the extra `html`) and `signals`
            (the recorded series).

    Raises:
        ConfigurationError: `formats` is empty or has an unknown format, or `dirpath` is a file.
    """

    report: Report | None
    """The report of the last run; `None` until it has ended."""

    def __init__(
        self, dirpath: str | Path | None = None, formats: Sequence[Format] = ("terminal", "json", "html", "signals")
    ) -> None:
        known = get_args(Format)
        if isinstance(formats, str) or not formats or any(f not in known for f in formats):
            raise ConfigurationError.of(
                "RootCauseReport(formats)",
                expected=f"a list of some of {', '.join(known)}",
                given=formats,
                do="Leave it out for all of them.",
            )
        self.dirpath = directory("RootCauseReport(dirpath)", dirpath)
        self.formats = tuple(formats)
        self.report = None
        self._started = time.monotonic()
        self._device: str | None = None

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.report = None
        self._started = time.monotonic()

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._device = str(trainer.strategy.root_device)

    @override
    def explain(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        if not len(self.flight.store.history):
            return
        self.report = build_report(
            self.flight.store,
            status=status,
            seconds=time.monotonic() - self._started,
            steps=trainer.global_step,
            device=self._device,
            error=error,
        )
        if trainer.is_global_zero:
            self._deliver(self.report)

    def _deliver(self, report: Report) -> None:
        """Writes and prints the formats; one that fails is named in the next ones."""
        folder = self.dirpath or self.flight.default_dirpath
        beside = [name for form, name in BESIDE.items() if form in self.formats]
        writers: dict[Format, Callable[[], Path]] = {
            "json": lambda: write_report(report, folder / "report.json", files=beside),
            "signals": lambda: write_signals(self.flight.store, folder / "signals"),
            "html": lambda: _write_page(report, folder / "report.html"),
        }
        files: list[Path] = []
        notes: list[str] = []
        for form, write in writers.items():
            if form in self.formats:
                _attempt(form, write, files, notes)
        if notes and folder / "report.json" in files:
            # The notes are about later files.
            names, known = [file.name for file in files[1:]], tuple(notes)
            rewrite = functools.partial(write_report, report, folder / "report.json", files=names, notes=known)
            _attempt("json with these notes", rewrite, [], notes)
        if "terminal" in self.formats:
            _print(TerminalReport(report=report, files=files, notes=notes))
        else:
            for note in notes:
                warn(note)


def _attempt(what: str, write: Callable[[], Path], files: list[Path], notes: list[str]) -> None:
    """Writes a file and adds its path to `files`, or the error to `notes`."""
    try:
        files.append(write())
    except MissingExtraError as missing:
        notes.append(str(missing))
    except Exception as broken:  # noqa: BLE001 - a full disk must not cost the printed report
        notes.append(f"{what} could not be written: {type(broken).__name__}: {broken}")


def _print(text: TerminalReport) -> None:
    """Prints on the console of Lightning's progress bar; another one would write into the bar's line."""
    try:
        rich.get_console().print(text)
    except SystemExit:  # rich ends the program when its output is closed (`| head`)
        warn("the report could not be printed, its output is closed. It is in the files.")


def _write_page(report: Report, path: Path) -> Path:
    """Writes the page; imports it only here, since matplotlib takes a second and may be absent."""
    written: Path = importlib.import_module("lightning_spike.report.html").write_page(report, path)
    return written
