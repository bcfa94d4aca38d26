"""Renders the report in the terminal: one line for a healthy run, else the likeliest cause first and in full."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lightning_spike.records import Episode, RunStatus, Verdict
from lightning_spike.report.braille import Drawing, draw
from lightning_spike.report.model import MIN_PROBABILITY, Curve, Report
from lightning_spike.report.wording import (
    actions_words,
    confirmed_words,
    count,
    duration,
    ending,
    episodes_words,
    evidence_words,
    family_words,
    headline,
    loss_words,
    number,
    percent,
    recovery_words,
    setting,
    steps_words,
    suspects_words,
)

MAX_WIDTH: Final = 120
"""Maximum number of columns; longer lines are hard to read."""
CURVE_ROWS: Final = 6
LABEL_WIDTH: Final = 9
"""Columns left of a curve, for its axis."""
BAR_WIDTH: Final = 20
MIN_RECOVERY_WIDTH: Final = 72
"""Columns from which the table of episodes has the recovery."""
MAX_EPISODES: Final = 6
MAX_CAUSES: Final = 4
MAX_EVIDENCE: Final = 5
MAX_ACTIONS: Final = 6
MAX_SUSPECTS: Final = 4
ASCII: Final = str.maketrans(
    {
        "─": "-", "│": "|", "┤": "|", "└": "+", "█": "#", "░": ".", "▔": "~", "•": "*", "→": ">", "×": "x", "✓": "+",
        "✗": "x", "–": "-", "−": "-", "…": ".", "·": "-", "’": "'",
    }
    | {chr(code): "*" for code in range(0x2801, 0x2900)}
)  # fmt: skip
"""For terminals that cannot show more: one character for one, so that columns stay in line."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TerminalReport:
    """A rich renderable for 60 columns or more, with and without colour."""

    report: Report
    files: Sequence[Path] = ()
    """Files that were written."""
    notes: Sequence[str] = ()
    """Errors of files that were not written."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich calls it."""
        options = options.update(width=min(options.max_width, MAX_WIDTH))
        parts = [self._one_line()] if self.report.healthy else [*_parts(self.report, options.max_width)]
        yield from print_lines(Group(*parts, *self._endings()), console, options)

    def _one_line(self) -> Text:
        report = self.report
        done = f"{count(report.steps, 'step')} ({count(report.epochs, 'epoch')}, {duration(report.seconds)})"
        line = Text.assemble(("lightning-spike", "bold"), ": ", ("no trouble", "green"), f" in {done}")
        if report.status is RunStatus.EXCEPTION:
            line.append(f" before {report.error or 'an exception'}")
        elif report.status is not RunStatus.FINISHED:
            line.append(f", {report.status.value.replace('_', ' ')}")
        if self.files:
            line.append(f". Files: {_common(self.files)}", style="dim")
        return line

    def _endings(self) -> Iterator[RenderableType]:
        """Failed parts, notes and, if not in the line of a healthy run, the files."""
        for part in self.report.disabled:
            at = "" if part.step is None else f" at step {part.step:,}"
            yield hanging("! ", Text(f"{part.part} broke{at} and was switched off: {part.reason}", style="yellow"))
        for note in self.notes:
            yield hanging("! ", Text(note, style="yellow"))
        if self.files and not self.report.healthy:
            names = ", ".join(path.name for path in self.files)
            yield Text.assemble(("Files: ", "bold"), f"{names} in {_common(self.files)}")


def _parts(report: Report, width: int) -> Iterator[RenderableType]:
    yield Text()
    yield title_line(headline(report), width)
    yield Text(" · ".join(filter(None, [ending(report), setting(report)])), style="dim")
    for verdict in report.likely[:1]:
        yield _cause_line(1, verdict, width)
        yield hanging("   ", Text(verdict.summary))
        yield from (hanging("   → ", Text(fix, style="bold")) for fix in verdict.fixes[:1])
    if report.error:
        yield hanging("! ", Text(report.error, style="red"))
    for curve in _curves(report):
        yield Text()
        yield from _curve(curve, report.episodes, width)
    if report.episodes:
        yield Text()
        yield _episodes(report, width)
    for verdict in report.likely[:1]:
        yield Text()
        yield from _why(report, verdict)
    for rank, verdict in enumerate(report.likely[1:MAX_CAUSES], start=2):
        yield Text()
        yield _cause_line(rank, verdict, width)
        yield hanging("   ", Text(verdict.summary))
    yield from _rest(report)
    yield from _listed("Samples that stand out", *_suspects(report))
    done = actions_words(report.actions)
    yield from _listed("What was done", done[:MAX_ACTIONS], len(done))
    yield from _listed("Could not be seen", report.remarks, len(report.remarks))
    yield Text()


def title_line(words: str, width: int) -> Text:
    """The first line of our terminal output."""
    title = Text.assemble(
        ("lightning-spike", "bold"), " ── ", (words, "bold red"), " ", overflow="ellipsis", no_wrap=True
    )
    return title.append("─" * max(0, width - title.cell_len))


def print_lines(whole: RenderableType, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
    """The lines without trailing blanks, in ASCII if the terminal needs it."""
    for line in console.render_lines(whole, options, pad=False):
        for segment in _without_trailing_space(line):
            yield _in_ascii(segment, options.encoding) if options.ascii_only else segment
        yield Segment.line()


# -- the curve ---------------------------------------------------------------------------------------------------------


def _curves(report: Report) -> Iterator[Curve]:
    if report.loss is not None:
        yield report.loss
    if any(e.signal == "val_loss" for e in report.episodes):
        yield from report.validation[:1]


def _curve(curve: Curve, episodes: Sequence[Episode], width: int) -> Iterator[Text]:
    drawing = draw(curve.ordinals, curve.values, width=width - LABEL_WIDTH - 2, height=CURVE_ROWS)
    if drawing is None:
        yield Text(f"{curve.name}: no finite value", style="dim")
        return
    yield Text(f"{curve.name}{', log scale' if drawing.log else ''}", style="dim")
    spans = [_span(e, drawing) for e in episodes]
    for i, row in enumerate(drawing.rows):
        label = {0: number(drawing.high), CURVE_ROWS - 1: number(drawing.low)}.get(i, "")
        line = Text(row, style="cyan")
        for start, stop in spans:
            line.stylize("bold red", start, stop)
        yield Text.assemble((f"{label:>{LABEL_WIDTH}} {'┤' if label else '│'}", "dim"), line)
    yield Text.assemble(" " * (LABEL_WIDTH + 2), (_marks(episodes, spans, drawing.width), "bold red"))
    left, right = f"step {curve.steps[0]:,}", f"{curve.steps[-1]:,}"
    yield Text(f"{'':{LABEL_WIDTH + 2}}{left}{right:>{drawing.width - len(left)}}", style="dim")


def _span(episode: Episode, drawing: Drawing) -> tuple[int, int]:
    stop = drawing.width - 1 if episode.end is None else drawing.column(episode.end.ordinal)
    return drawing.column(episode.onset.ordinal), stop + 1


def _marks(episodes: Sequence[Episode], spans: Sequence[tuple[int, int]], width: int) -> str:
    """The line under a curve: each episode's range, with its number at the onset if there is room."""
    marks = [" "] * width
    for start, stop in spans:
        marks[start:stop] = "▔" * (stop - start)
    for episode, (start, _) in zip(episodes, spans, strict=True):
        name = str(episode.id)
        room = marks[start : start + len(name)]
        if len(room) == len(name) and not any(mark.isdigit() for mark in marks[max(start - 1, 0) : start + len(name)]):
            marks[start : start + len(name)] = name
    return "".join(marks)


# -- the episodes ------------------------------------------------------------------------------------------------------


def _episodes(report: Report, width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    for name in ("kind", "steps", "loss", *(["came back"] if width >= MIN_RECOVERY_WIDTH else [])):
        table.add_column(name, no_wrap=True)
    table.add_column("likeliest cause", overflow="fold")
    worst = sorted(report.episodes, key=lambda e: -e.severity)[:MAX_EPISODES]
    for episode in sorted(worst, key=lambda e: (e.onset.ordinal, e.id)):
        causes = report.causes_of.get(episode.id, ())
        likeliest = f"{causes[0].cause} {percent(causes[0].probability)}" if causes else "unexplained"
        cells = [str(episode.id), episode.kind.value, steps_words(episode), loss_words(episode)]
        cells += [recovery_words(episode)] if width >= MIN_RECOVERY_WIDTH else []
        table.add_row(*map(Text, [*cells, likeliest]))
    more = len(report.episodes) - len(worst)
    return Group(table, Text(f"and {count(more, 'milder episode')} in the files", style="dim")) if more else table


# -- the causes --------------------------------------------------------------------------------------------------------


def _cause_line(rank: int, verdict: Verdict, width: int) -> Text:
    filled = round(BAR_WIDTH * min(max(verdict.probability, 0.0), 1.0))
    mark = {True: "green", False: "red", None: "dim"}[verdict.confirmed]
    line = Text.assemble(
        (f"{rank}  {verdict.cause}", "bold"),
        (f"  {family_words(verdict.family)}, {episodes_words(verdict.episodes)}", "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )
    share = f" {percent(verdict.probability):>5}  "
    bar = ("█" * filled, "cyan"), ("░" * (BAR_WIDTH - filled), "dim")
    tail = Text.assemble(*bar, share, (confirmed_words(verdict)[0], mark))
    line.truncate(max(width - tail.cell_len - 2, 1), overflow="ellipsis", pad=True)
    return Text.assemble(line, "  ", tail)


def _why(report: Report, verdict: Verdict) -> Iterator[RenderableType]:
    """What the first verdict rests on, and what else to change."""
    yield Text(f"Why {verdict.cause}", style="bold")
    if verdict.confirmed is not None:
        yield hanging("   ", Text(confirmed_words(verdict), style="green" if verdict.confirmed else "red"))
    why_not = report.why_not_confirmed(verdict)
    if why_not is not None:
        yield hanging("   ", Text(f"– not confirmed by replay: {why_not}", style="dim"))
    strongest = sorted(verdict.evidence, key=lambda e: -abs(e.weight))[:MAX_EVIDENCE]
    for evidence in strongest:
        sign = "   − " if evidence.weight < 0 else "   + "
        yield hanging(sign, Text.assemble(evidence.text, (f"  [{evidence_words(evidence)}]", "dim")))
    if len(verdict.fixes) > 1:
        yield Text("What else to change", style="bold")
    yield from (hanging("   → ", Text(fix, style="bold")) for fix in verdict.fixes[1:])


def _rest(report: Report) -> Iterator[RenderableType]:
    """The number of fainter causes and the unexplained probability."""
    fainter = len(report.causes) - len(report.likely[:MAX_CAUSES])
    said = [f"{count(fainter, 'fainter cause')} in the files"] if fainter else []
    if report.unexplained >= MIN_PROBABILITY:
        said.append(f"unexplained: {percent(report.unexplained)}")
    if said:
        yield Text()
        yield Text("   " + " · ".join(said), style="dim")


# -- the rest ----------------------------------------------------------------------------------------------------------


def _suspects(report: Report) -> tuple[list[str], int]:
    """A line for each batch with its worst samples, and the number of batches."""
    batches = [list(group) for _, group in itertools.groupby(report.suspects, key=lambda s: s.step)]
    return [suspects_words(batch[:MAX_SUSPECTS]) for batch in batches[:MAX_ACTIONS]], len(batches)


def _listed(heading: str, lines: Sequence[str], total: int) -> Iterator[RenderableType]:
    if not lines:
        return
    yield Text()
    yield Text(heading, style="bold")
    yield from (hanging("   • ", Text(line)) for line in lines)
    if total > len(lines):
        yield Text(f"     and {total - len(lines):,} more in the files", style="dim")


def hanging(lead: str, text: Text) -> RenderableType:
    """A paragraph with a hanging indent after `lead`."""
    if not lead.strip():
        return Padding(text, (0, 0, 0, len(lead)))
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True, width=len(lead))
    grid.add_column(ratio=1)
    grid.add_row(Text(lead, style=text.style), text)
    return grid


def _common(files: Sequence[Path]) -> str:
    """The folder of the files, relative to the working directory if inside it."""
    folder = files[0].parent
    try:
        return f"{folder.resolve().relative_to(Path.cwd())}/"
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return f"{folder}/"


def _without_trailing_space(line: list[Segment]) -> list[Segment]:
    """A line without trailing blanks, for copying and logs."""
    while line and not line[-1].text.strip() and not line[-1].control:
        line = line[:-1]
    if line and not line[-1].control:
        line = [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
    return line


def _in_ascii(segment: Segment, encoding: str) -> Segment:
    if segment.control:
        return segment
    plain = segment.text.translate(ASCII)
    return Segment(plain.encode(encoding, errors="replace").decode(encoding), segment.style)
