"""The page: whole, offline, safe with strings of the user's."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lightning_spike.errors import MissingExtraError
from lightning_spike.records import EpisodeKind, OptimizerFacts, RunFacts, SchedulerFacts
from lightning_spike.report import html
from lightning_spike.report.html import render_page, write_page
from lightning_spike.report.model import Curve

matplotlib = pytest.importorskip("matplotlib", reason="the page needs the extra html")

VOID = {"meta", "link", "br", "hr", "img", "input"}
ADDRESS_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}


class Outline(HTMLParser):
    """Every tag with its attributes, the text, and whether all that opens closes."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def outlined(page):
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def test_a_troubled_run_is_told_from_headline_to_settings(troubled):
    text = outlined(render_page(troubled)).text
    for said in (
        "2 episodes, most likely lr_restart (91 %)",
        "confirmed by replay",
        "Lower the peak of the restarts",
        "400–431",
        "Came back",
        "1 fainter cause",
        "Dataset index",
        "No space left on device",
        "gradient clipping",
    ):
        assert said in text


def test_a_healthy_run_says_so(healthy):
    text = outlined(render_page(healthy)).text
    assert "No trouble" in text
    assert "Episodes" not in text


def test_nothing_is_fetched_and_nothing_runs(troubled):
    outline = outlined(render_page(troubled))
    assert {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "img", "object", "embed"} == set()
    addresses = [
        value for _, attributes in outline.tags for name, value in attributes.items() if name in ADDRESS_ATTRIBUTES
    ]
    assert [a for a in addresses if not a.startswith("#")] == []
    assert re.findall(r"url\((?!#)", render_page(troubled)) == []
    assert [(t, n) for t, attributes in outline.tags for n in attributes if n.startswith("on")] == []


def test_strings_of_the_user_stay_text(troubled):
    evil = "<script>alert(1)</script>\"'&"
    name = Curve(
        **{f.name: getattr(troubled.loss, f.name) for f in dataclasses.fields(Curve)} | {"name": f"{evil}$x_{{"}
    )
    facts = RunFacts(
        started="now",
        optimizers=(OptimizerFacts(name=evil, class_name=evil, groups=({"lr": 1.0},)),),
        schedulers=(SchedulerFacts(class_name=evil, optimizer=evil, interval="step", frequency=2),),
    )
    first = dataclasses.replace(troubled.causes[0], summary=evil, fixes=(evil,))
    page = render_page(
        dataclasses.replace(
            troubled, error=evil, facts=facts, causes=(first,), remarks=(evil,), rates=(name, name), validation=(name,)
        )
    )
    outline = outlined(page)
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.text.count("<script>alert(1)</script>") > 6


def test_the_figure_marks_every_episode_on_every_panel(troubled):
    page = render_page(dataclasses.replace(troubled, episodes=troubled.episodes[:1]))
    more = render_page(troubled)
    stroke = "stroke: var(--bad)"
    assert (more.count(stroke) - page.count(stroke)) == 2 * 3


def test_only_the_pages_own_colours_are_used(troubled):
    page = render_page(troubled)
    figures = page[page.index("<svg") : page.rindex("</svg>")]
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b(?=[;\"])", figures)) == set()
    declared = set(re.findall(r"(--[a-z0-9-]+):", page))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page)) <= declared


def test_the_users_matplotlib_is_left_alone(troubled, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    before = dict(matplotlib.rcParams)
    assert "<svg" in render_page(troubled)
    assert dict(matplotlib.rcParams) == before


def curve(values):
    n = len(values)
    return Curve(name="loss", ordinals=np.arange(n), steps=np.arange(n), values=np.array(values, dtype=float))


@pytest.mark.parametrize(
    "values",
    [[1.0], [np.nan], [np.nan] * 5, [0.0, 0.0], [-1.0, 1e308], [np.inf, 1.0, np.nan], [1e-320, 1.0], list(range(5000))],
    ids=["one", "one NaN", "NaN", "zero", "huge", "Inf", "tiny", "long"],
)
def test_any_loss_is_drawn(troubled, values):
    page = render_page(
        dataclasses.replace(troubled, loss=curve(values), rates=(), grad_norm=None, validation=(), episodes=())
    )
    outlined(page)
    assert "<svg" in page


def test_a_run_of_which_nothing_was_recorded_has_no_figure(healthy):
    page = render_page(dataclasses.replace(healthy, loss=None, rates=(), grad_norm=None, validation=()))
    assert "<svg" not in page


def test_overfitting_without_a_training_loss_is_drawn_by_its_validations(troubled):
    overfit = dataclasses.replace(troubled.episodes[0], kind=EpisodeKind.OVERFIT, signal="val_loss")
    assert "<svg" in render_page(dataclasses.replace(troubled, loss=None, episodes=(overfit,)))


def test_a_long_series_is_thinned_but_keeps_its_extremes(troubled):
    from lightning_spike.report.figure import MAX_POINTS, _thinned  # noqa: PLC0415 - needs matplotlib

    values = np.random.default_rng(0).normal(size=20_000)
    values[11_111], values[5_555], values[7_777] = 99.0, -99.0, np.nan
    x, y = _thinned(curve(values))
    assert len(x) <= 1.01 * MAX_POINTS
    assert (np.nanmax(y), np.nanmin(y)) == (99.0, -99.0)
    assert x[np.isnan(y)].tolist() == [7_777]
    assert (np.diff(x) > 0).all()


def test_it_is_written_whole(troubled, tmp_path):
    assert write_page(troubled, tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_it_says_which_to_install(healthy, monkeypatch, package):
    real = html.importlib.util.find_spec
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'lightning-spike\[html\]'"):
        render_page(healthy)
