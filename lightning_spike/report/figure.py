"""Draws the curves of a run as one SVG for the page; needs matplotlib.

The page's style sheet has the colours: matplotlib draws in placeholders, which are replaced by `var(--…)` in the text.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lightning_spike.records import Episode
from lightning_spike.report.braille import MIN_LOG_RATIO
from lightning_spike.report.model import Curve, Report
from lightning_spike.report.wording import number

INK, GRID, BAD = "#010101", "#020202", "#030303"
LINES: Final = ("#040404", "#050505", "#060606", "#070707")
"""One colour a curve in a panel; more curves than colours begin again."""

VARIABLES: Final = {
    INK: "var(--ink)", GRID: "var(--grid)", BAD: "var(--bad)",
    LINES[0]: "var(--line-1)", LINES[1]: "var(--line-2)", LINES[2]: "var(--line-3)", LINES[3]: "var(--line-4)",
}  # fmt: skip

MAX_POINTS: Final = 1600
"""Points a curve is drawn with: two for each of the 800 or so pixels that it is wide."""

SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID, "axes.labelcolor": INK,
    "axes.titlecolor": INK, "axes.formatter.use_mathtext": False, "axes.facecolor": "none", "axes.unicode_minus": True,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "figure.facecolor": "none", "grid.color": GRID, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.1, "path.simplify": True,
}  # fmt: skip


def draw_svg(report: Report, *, width: float, panel_height: float) -> str:
    """Draws loss and validations, learning rates and gradient norm below one another, with the episodes shaded.

    The user's matplotlib settings and backend are neither used nor changed.

    Args:
        report: What to draw.
        width: Inches, at 72 pixels each.
        panel_height: Inches for each of the up to three panels.

    Returns:
        An `<svg>` element; an empty string if nothing was recorded.
    """
    panels = [*_panels(report)]
    if not panels:
        return ""
    # Values near the largest float or names in a script that the font lacks raise warnings that help no reader.
    with mpl.rc_context(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS | {"svg.hashsalt": f"{width}"})
        height = panel_height * len(panels) + 0.3
        figure = Figure(figsize=(width, height))
        # Margins in inches rather than a layout engine, which takes as long again as the drawing.
        figure.subplots_adjust(
            left=0.62 / width, right=1 - 0.12 / width, bottom=0.45 / height, top=1 - 0.25 / height, hspace=0.3
        )
        FigureCanvasSVG(figure)
        axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for ax, (title, curves, points) in zip(axes, panels, strict=True):
            _panel(ax, title, curves, points)
            _shade(ax, report.episodes, curves[0] if curves else points[0])
        _number(axes[0], report.episodes)
        _step_axis(axes[-1], panels[0][1] or panels[0][2])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue())


Panel = tuple[str, Sequence[Curve], Sequence[Curve]]


def _panels(report: Report) -> Iterator[Panel]:
    """Title, curves drawn as lines, curves drawn as points."""
    losses = [report.loss] if report.loss is not None else []
    if losses or report.validation:
        yield "loss", losses, report.validation
    if report.rates:
        yield "learning rate", report.rates, ()
    if report.grad_norm is not None:
        yield "gradient norm", [report.grad_norm], ()


def _panel(ax: Axes, title: str, curves: Sequence[Curve], points: Sequence[Curve]) -> None:
    ax.set_title(title, loc="left", fontsize=9)
    ax.grid(visible=True, axis="y", linewidth=0.5)
    values = []
    for i, curve in enumerate([*curves, *points]):
        x, y = _thinned(curve)
        ax.plot(
            x, y, color=LINES[i % len(LINES)], label=curve.name, marker="o" if curve in points else "", markersize=3.5
        )
        values.append(y[np.isfinite(y)])
    finite = np.concatenate(values)
    if finite.size and finite.min() > 0 and finite.max() / finite.min() >= MIN_LOG_RATIO:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    if len(values) > 1:
        # Above the axes, beside the title: inside, some curve always runs through it.
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, ncols=3)


def _thinned(curve: Curve) -> tuple[Any, Any]:
    """At most `MAX_POINTS` points: the lowest and highest value of each interval, and a gap for a non-finite one."""
    n = len(curve.values)
    if n <= MAX_POINTS:
        return curve.ordinals, np.where(np.isfinite(curve.values), curve.values, np.nan)
    kept: list[int] = []
    for stretch in np.array_split(np.arange(n), MAX_POINTS // 2):
        values = curve.values[stretch]
        broken = np.flatnonzero(~np.isfinite(values))
        finite = np.flatnonzero(np.isfinite(values))
        ends = [finite[values[finite].argmin()], finite[values[finite].argmax()]] if finite.size else []
        kept.extend(stretch[sorted({*ends, *broken[:1]})])
    values = curve.values[kept]
    return curve.ordinals[kept], np.where(np.isfinite(values), values, np.nan)


def _shade(ax: Axes, episodes: Sequence[Episode], curve: Curve) -> None:
    for episode in episodes:
        last = int(curve.ordinals[-1]) if episode.end is None else episode.end.ordinal
        ax.axvspan(episode.onset.ordinal, max(last, episode.onset.ordinal + 1), color=BAD, alpha=0.16, linewidth=0)
        ax.axvline(episode.onset.ordinal, color=BAD, linewidth=0.8)


def _number(ax: Axes, episodes: Sequence[Episode]) -> None:
    """Writes the episodes' numbers above the panel."""
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
    for episode in episodes:
        place = (episode.onset.ordinal, 1)
        ax.annotate(str(episode.id), place, **above, ha="center", color=BAD, fontsize=8)  # type: ignore[arg-type]


def _step_axis(ax: Axes, curves: Sequence[Curve]) -> None:
    """Labels the batches with their step, which several share under accumulation."""
    ordinals, steps = curves[0].ordinals, curves[0].steps

    def name(x: float, _: int) -> str:
        return f"{round(float(np.interp(x, ordinals, steps))):,}"

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(name))
    ax.set_xlim(float(ordinals[0]), float(max(ordinals[-1], ordinals[0] + 1)))
    ax.set_xlabel("step")


def _for_page(svg: str) -> str:
    """The element alone, in the page's colours."""
    element = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        element = element.replace(colour, variable)
    return element
