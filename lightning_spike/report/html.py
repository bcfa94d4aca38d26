"""Writes `report.html`, one offline page; needs the extra `html` (jinja2, matplotlib)."""

import importlib
import importlib.resources
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lightning_spike.errors import MissingExtraError
from lightning_spike.files import write_whole
from lightning_spike.records import OptimizerFacts, RunFacts, SchedulerFacts
from lightning_spike.report import wording
from lightning_spike.report.model import Report

TEMPLATE: Final = "page.html.jinja"
WIDE, NARROW = (10.0, 1.9), (4.6, 1.5)
"""Width of the figure and height of a panel in inches, for a screen and a phone: figure text cannot flow."""


def write_page(report: Report, path: Path) -> Path:
    """Writes the page atomically.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        OSError: It could not be written.
    """
    return write_whole(path, render_page(report))


def render_page(report: Report) -> str:
    """Returns the page as text, with styles and figures, without scripts or external files; the user's text is escaped.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError.of("report.html", extra="html", package=package)
    jinja2 = importlib.import_module("jinja2")
    draw_svg = importlib.import_module("lightning_spike.report.figure").draw_svg
    blanks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, **blanks)
    source = importlib.resources.files("lightning_spike.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    figures = {
        name: draw_svg(report, width=w, panel_height=h) for name, (w, h) in {"wide": WIDE, "narrow": NARROW}.items()
    }
    page: str = environment.from_string(source).render(
        report=report,
        say=wording,
        # `draw_svg` escapes what it writes; nothing else goes into the page unescaped.
        figures={name: jinja2.utils.markupsafe.Markup(svg) for name, svg in figures.items()},
        settings=dict(_settings(report.facts)),
        version=importlib.import_module("lightning_spike").__version__,
    )
    return page


def _settings(facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "started", facts.started
    yield "precision", facts.precision
    yield "ranks", str(facts.world_size)
    for optimizer in facts.optimizers:
        yield f"optimizer {optimizer.name}", _optimizer(optimizer)
    for scheduler in facts.schedulers:
        yield f"scheduler of {scheduler.optimizer}", _scheduler(scheduler)
    yield "gradient clipping", _clipping(facts)
    yield "gradient accumulation", wording.count(facts.accumulate_grad_batches, "batch").replace("batchs", "batches")
    yield "optimization", "automatic" if facts.automatic_optimization else "manual"
    if facts.batches_per_epoch is not None:
        yield "batches per epoch", f"{facts.batches_per_epoch:,}"
    if facts.resumed_from:
        yield "resumed from", f"{facts.resumed_from} at step {facts.first_step:,}"


def _optimizer(optimizer: OptimizerFacts) -> str:
    groups = [_pairs(group) for group in optimizer.groups]
    return f"{optimizer.class_name}: " + "; ".join(dict.fromkeys(groups)) if groups else optimizer.class_name


def _scheduler(scheduler: SchedulerFacts) -> str:
    many = scheduler.frequency > 1
    every = f"every {scheduler.frequency} {scheduler.interval}s" if many else f"every {scheduler.interval}"
    return ", ".join(filter(None, [scheduler.class_name, every, _pairs(scheduler.settings)]))


def _clipping(facts: RunFacts) -> str:
    if facts.gradient_clip_val is not None:
        return f"{facts.gradient_clip_algorithm} {facts.gradient_clip_val:g}"
    return "by the module itself, or none" if facts.clips_by_hand else "none"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
