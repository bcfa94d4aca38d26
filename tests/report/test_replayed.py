"""What was found after the run, in the terminal and as JSON."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from lightning_spike.records import Episode, EpisodeKind, Finding, Moment
from lightning_spike.report.replayed import Replayed, ReplayReport, write_replay

AT = Moment(ordinal=84, step=42, epoch=2, batch_idx=20)
EPISODE = Episode(id=3, kind=EpisodeKind.NONFINITE, onset=AT, noticed=AT, peak=AT, loss_before=0.31, loss_peak=math.nan)


def finding(kind, **detail):
    return Finding(detector="lab", kind=kind, at=AT, detail={"episode": 3, **detail})


def scene(*findings):
    place = Path("run/spike/scenes/episode_0003")
    return Replayed(
        place=place, started="2026-11-22T14:08:00+00:00", episode=EPISODE, batches=35, findings=findings, seconds=0.34
    )


SPLIT = {
    "verdict": "data",
    "exact": True,
    "why_not_exact": None,
    "jump": math.inf,
    "text": "The batch itself makes the jump.",
}
ORIGIN = {"phase": "loss", "text": "The first value that is not finite is born in the loss."}
WHOLE = scene(
    finding("nonfinite_origin", **ORIGIN),
    finding("split", **SPLIT),
    finding("later", text="A sentence of a later lab."),
    finding("cost", steps=40),
)


def printed(report, width=100, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, color_system=None).print(report)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def report(*scenes, **options):
    return ReplayReport(scenes=scenes, device="cpu", configs=[Path("config.yaml")], **options)


def test_it_says_what_was_run_again_what_came_of_it_and_every_sentence():
    lines = printed(report(WHOLE, file=Path("run/spike/replay.json")), width=120).splitlines()
    assert lines[1].startswith("lightning-spike ── replay of 1 episode ──")
    assert [line.rstrip() for line in lines[2:]] == [
        "",
        "Episode 3: nonfinite at step 42 (epoch 2, batch 20)  0.31 → NaN",
        "   Run again: 35 batches from the last healthy snapshot, with the same losses as in the training, 0.3 s on cpu",
        "   what made the loss jump: the batch",
        "   • The first value that is not finite is born in the loss.",
        "   • The batch itself makes the jump.",
        "   • A sentence of a later lab.",
        "",
        "File: run/spike/replay.json",
        "",
    ]


SPLITS = {
    "other": ({"verdict": "not_reproduced"}, ["and there the loss is another", "jump: does not come back"]),
    "inexact": ({"exact": False, "why_not_exact": "no reason"}, ["Not run again step by step: no reason,"]),
    "new": ({"verdict": "something new"}, ["jump: something new"]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_other_splits_have_their_words(case):
    changed, said = SPLITS[case]
    text = " ".join(printed(report(scene(finding("split", **SPLIT | changed)))).split())
    assert all(words in text for words in said)


def test_why_nothing_was_run_again_and_notes_are_said():
    text = printed(report(scene(finding("not_run", why="no batch is held")), notes=["The run was on cuda."]))
    assert "not run again: no batch is held" in text
    assert "! The run was on cuda." in text
    assert "what made" not in text


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal_or_120_columns(width):
    assert max(map(len, printed(report(WHOLE), width=width).splitlines())) <= min(width, 120)


def test_a_terminal_without_unicode_gets_ascii():
    assert printed(report(WHOLE), encoding="ascii").isascii()


def test_the_file_is_strict_json_with_all_findings(tmp_path):
    here = Replayed(**{f: getattr(WHOLE, f) for f in WHOLE.__slots__} | {"place": tmp_path / "scenes" / "episode_0003"})
    path = write_replay(report(here, notes=["A note."]), tmp_path / "replay.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    (told,) = content["scenes"]
    assert content["schema_version"] == 1
    assert content["notes"] == ["A note."]
    assert (told["path"], told["episode"], told["examined"], told["batches"]) == ("scenes/episode_0003", 3, True, 35)
    assert told["onset"] == {"ordinal": 84, "step": 42, "epoch": 2, "batch_idx": 20}
    assert [f["kind"] for f in told["findings"]] == ["nonfinite_origin", "split", "later", "cost"]
    assert told["findings"][1]["detail"]["jump"] is None
    assert content["nonfinite"] == {"/scenes/0/findings/1/detail/jump": "Infinity"}
