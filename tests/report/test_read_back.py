"""What was written comes back: the text that a terminal shows is the same before and after, at any width."""

import dataclasses
import json
import math
import shutil
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from lightning_spike.errors import UnreadableReportError
from lightning_spike.records import Action, Moment, RunFacts, RunStatus, StepRow, ValidationPoint
from lightning_spike.report import model
from lightning_spike.report.json_file import write_report
from lightning_spike.report.model import build_report
from lightning_spike.report.read_back import find_report, read_back
from lightning_spike.report.signals_file import write_signals
from lightning_spike.report.terminal import TerminalReport
from lightning_spike.store import TrainerStateStore

CURVES = ("loss", "rates", "grad_norm", "validation")


def text(terminal, width=80):
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(terminal)
    return console.file.getvalue()


def written(report, store, folder, notes=()):
    """Write as a run does, and return what it prints."""
    path = write_report(report, folder / "report.json", files=["signals"], notes=notes)
    return TerminalReport(report=report, files=[path, write_signals(store, folder / "signals")], notes=notes)


def change(folder, **keys):
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_text_is_the_same_at_any_width(troubled, troubled_run, tmp_path, width):
    before = written(troubled, troubled_run, tmp_path, notes=["html needs the package 'jinja2'."])
    shown = text(before, width)
    assert "NaN" in shown
    assert text(read_back(tmp_path), width) == shown


def test_the_record_is_the_same(troubled, troubled_run, tmp_path):
    report = dataclasses.replace(troubled, not_replayed={2: "the budget is used up"})
    written(report, troubled_run, tmp_path)
    again = read_back(tmp_path).report
    for field in dataclasses.fields(report):
        if field.name == "recorded":  # mappings come back read-only
            assert again.recorded == report.recorded
        elif field.name not in CURVES:
            assert repr(getattr(again, field.name)) == repr(getattr(report, field.name)), field.name


def same(one, other):
    assert one.name == other.name
    for name in ("ordinals", "steps", "values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


def test_the_curves_are_the_same(tmp_path):
    """Batches without a loss, a loss that is NaN or infinite, two rates, accumulated steps, two metrics in turns."""
    store = TrainerStateStore(RunFacts(started="now"))
    losses = [1.0, None, math.nan, math.inf, -math.inf, 2.0, None]
    for i, loss in enumerate(losses):
        at = Moment(ordinal=i, step=i // 2, epoch=0, batch_idx=i)
        values = {"lr-SGD": 0.1, "lr-SGD/pg2": 0.2 + i} | ({} if loss is None else {"loss": loss})
        store.append(StepRow(at=at, values=values))
        store.note(*(ValidationPoint(at=at, metric=m, value=math.nan if i else 1.0) for m in ("val_loss", "a")))
    report = build_report(store, status=RunStatus.FINISHED, seconds=1.0)
    written(report, store, tmp_path)
    again = read_back(tmp_path).report
    same(again.loss, report.loss)
    assert again.loss.ordinals.tolist() == [0, 2, 3, 4, 5]
    assert again.grad_norm is None
    for name in ("rates", "validation"):
        for one, other in zip(getattr(again, name), getattr(report, name), strict=True):
            same(one, other)


@pytest.mark.parametrize("seconds", [9.9496, 13.4996, 59.4999, 0.04999])
def test_the_time_is_rounded_once(seconds, tmp_path):
    report = build_report(TrainerStateStore(RunFacts(started="now")), status=RunStatus.FINISHED, seconds=seconds)
    write_report(report, tmp_path / "report.json")
    assert text(read_back(tmp_path)) == text(TerminalReport(report=report, files=[tmp_path / "report.json"]))


def test_without_signals_only_the_curves_are_missing(troubled, troubled_run, tmp_path):
    written(troubled, troubled_run, tmp_path)
    shutil.rmtree(tmp_path / "signals")
    bare = dataclasses.replace(troubled, loss=None, rates=(), grad_norm=None, validation=())
    assert text(read_back(tmp_path)) == text(TerminalReport(report=bare, files=[tmp_path / "report.json"]))


def test_signals_that_are_broken_cost_the_curves_and_are_named(troubled, troubled_run, tmp_path):
    written(troubled, troubled_run, tmp_path)
    (tmp_path / "signals" / "series.npz").write_bytes(b"no zip")
    again = read_back(tmp_path)
    assert again.report.loss is None
    assert any("series.npz" in note for note in again.notes)
    assert "lr_restart" in text(again)


def test_what_another_run_left_there_is_not_taken_for_this_ones(troubled, healthy, troubled_run, tmp_path):
    written(troubled, troubled_run, tmp_path)
    (tmp_path / "report.html").write_text("of another run")
    write_report(healthy, tmp_path / "report.json", files=[])
    again = read_back(tmp_path)
    assert again.report.loss is None
    assert again.files == [tmp_path / "report.json"]


def test_the_keys_that_the_contract_names_are_enough(troubled, troubled_run, tmp_path):
    """A report of another version 1: every key that was added is taken away, and keys that nobody knows are there."""
    written(troubled, troubled_run, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    run, episode = ("status", "steps", "epochs", "seconds", "world_size", "precision", "started"), (
        "id", "kind", "onset_step", "peak_step", "end_step", "epoch", "batch_idx", "loss_before", "loss_peak", "causes",
    )  # fmt: skip
    for causes in (content["causes"], *(e["causes"] for e in content["episodes"])):
        for evidence in (e for cause in causes for e in cause["evidence"]):
            del evidence["weight"]
    bare = {
        "schema_version": 1,
        "lightning_spike": "0.1.0",
        "run": {key: content["run"][key] for key in run} | {"new": 1},
        "episodes": [{key: e[key] for key in episode} | {"new": 1} for e in content["episodes"]],
        "causes": content["causes"],
        "actions": [{key: a[key] for key in ("action", "step", "detail")} for a in content["actions"]],
        "new": 1,
    }
    (tmp_path / "report.json").write_text(json.dumps(bare))
    again = read_back(tmp_path)
    assert [e.onset.step for e in again.report.episodes] == [400, 800]
    assert again.report.loss is not None
    assert "most likely lr_restart (91 %)" in text(again)


def test_a_moment_may_hold_further_keys(troubled, troubled_run, tmp_path):
    written(troubled, troubled_run, tmp_path)
    episodes = json.loads((tmp_path / "report.json").read_text())["episodes"]
    episodes[0]["moments"]["onset"]["new"] = 1
    change(tmp_path, episodes=episodes)
    assert read_back(tmp_path).report.episodes[0] == troubled.episodes[0]


def test_it_is_found_in_its_folder_above_it_and_by_itself(healthy, tmp_path):
    path = write_report(healthy, tmp_path / "spike" / "report.json")
    assert find_report(tmp_path) == find_report(tmp_path / "spike") == find_report(str(path)) == path
    moved = path.rename(tmp_path / "mine.json")
    assert read_back(moved).files == [moved]


@pytest.mark.parametrize(
    "keys",
    [
        {"run": {}},
        {"run": []},
        {"causes": [{}]},
        {"actions": 3},
        {"episodes": [None]},
        {"nonfinite": {"/episodes/9/loss_peak": "NaN"}},
        {"nonfinite": {"/run/seconds/x": "NaN"}},
        {"nonfinite": {"/run/seconds": "many"}},
    ],
    ids=str,
)
def test_a_report_with_a_wrong_part_is_refused_in_one_line(healthy, tmp_path, keys):
    write_report(healthy, tmp_path / "report.json")
    change(tmp_path, **keys)
    with pytest.raises(UnreadableReportError, match=r"report\.json: expected .*, found .*\. Take ") as refused:
        read_back(tmp_path)
    assert "\n" not in str(refused.value)


def test_numbers_that_are_not_finite_are_said_as_before(troubled, troubled_run, tmp_path):
    """In evidence, in a suspect's loss and in what was done: null would read as "none" in all three."""
    cause = troubled.causes[0]
    evidence = dataclasses.replace(cause.evidence[0], observed=math.inf, expected=-math.inf, weight=9.0)
    causes = (dataclasses.replace(cause, evidence=(evidence,)), *troubled.causes[1:])
    at = Moment(ordinal=1, step=1, epoch=0, batch_idx=1)
    rollback = Action(action="rollback", at=at, detail={"loss": math.nan, "lr_scale": 0.5})
    actions = (*troubled.actions, rollback)
    report = dataclasses.replace(troubled, causes=causes, actions=actions, suspects=tuple(model.suspects_of(actions)))
    shown = text(written(report, troubled_run, tmp_path))
    for said in ("Inf, expected -Inf", "loss NaN, lr_scale 0.5", "(loss NaN)"):
        assert said in " ".join(shown.split())
    assert text(read_back(tmp_path)) == shown
