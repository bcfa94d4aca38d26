"""Runs demos one after the other and says which cause each report put first."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from lightning_spike.demo.catalogue import Demo
from lightning_spike.report.json_file import read_report

_NOT_HERE: Final = (
    "LightningCLI's args parameter is intended",  # the demo is the one that fills it in
    ".*does not have many workers",  # the data are in memory
    "The number of training batches",  # there is no logger
    ".*isinstance.treespec, LeafSpec.",  # between torch and Lightning
    r"\s*By default only one JsonargparseDeprecationWarning",  # between jsonargparse and Lightning
    "(?s).*deprecated in v4.*removed in v5",
)
"""Warnings of other packages that say nothing about these trainings, as regular expressions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one demo."""

    demo: Demo
    first: str | None
    """The cause that came first in the report; None where it has none."""
    folder: Path
    """The folder of its report."""
    seconds: float
    """Wall time of the whole demo."""

    @property
    def as_expected(self) -> bool:
        """Whether the cause that came first is the one that it was built with."""
        return self.first == self.demo.expected


def show(demos: Sequence[Demo], out: Path, train: Callable[[list[str]], object], console: Console) -> list[Outcome]:
    """Train each demo with its progress and its report on the screen, and close with one line for each.

    Args:
        demos: Which, in this order.
        out: Folder that gets one folder per demo.
        train: Runs a `SpikeCLI` with the given command line.
        console: Where to print; the one that the progress bar uses.

    Returns:
        What came of each.

    Raises:
        UnreadableReportError: A demo wrote no report.
    """
    outcomes = []
    for number, demo in enumerate(demos, start=1):
        console.rule(Text(f"{number}/{len(demos)} {demo.title}", style="bold"), align="left")
        outcomes.append(_run(demo, out / demo.name, train))
    console.rule(Text("What was found", style="bold"), align="left")
    for line in _summary(outcomes):
        console.print(line, soft_wrap=True)
    return outcomes


def _run(demo: Demo, folder: Path, train: Callable[[list[str]], object]) -> Outcome:
    started = time.monotonic()
    report = folder / "report.json"
    report.unlink(missing_ok=True)  # an earlier run's must not stand in for this one's
    with warnings.catch_warnings():
        for message in _NOT_HERE:
            warnings.filterwarnings("ignore", message=message)
        train(demo.arguments(folder))
    causes = read_report(report)["causes"]
    first = causes[0]["cause"] if causes else None
    return Outcome(demo=demo, first=first, folder=folder, seconds=time.monotonic() - started)


def _summary(outcomes: Sequence[Outcome]) -> Iterable[Text]:
    for outcome in outcomes:
        found = f"{outcome.first or 'no cause'} first"
        verdict = ("as expected", "green") if outcome.as_expected else (f"expected {outcome.demo.expected}", "red")
        yield Text.assemble(
            (f"{outcome.demo.name:<16}", "bold"), f" {found}, ", verdict, f", {outcome.seconds:.0f} s: {outcome.folder}"
        )
