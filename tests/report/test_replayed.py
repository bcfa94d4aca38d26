"""What was found after the run, in the terminal and as JSON."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from lightning_spike.codec import from_plain
from lightning_spike.diagnosis import sentences
from lightning_spike.experiments import Cost, Experiments, FirstNonFinite, OutsideChange, Replay, Split
from lightning_spike.records import Episode, EpisodeKind, Moment
from lightning_spike.report.json_file import with_nonfinite
from lightning_spike.report.replayed import Replayed, ReplayReport, write_replay

AT = Moment(ordinal=84, step=42, epoch=2, batch_idx=20)
EPISODE = Episode(id=3, kind=EpisodeKind.NONFINITE, onset=AT, noticed=AT, peak=AT, loss_before=0.31, loss_peak=math.nan)


def scene(**fields):
    place = Path("run/spike/scenes/episode_0003")
    return Replayed(
        place=place, started="2026-11-22T14:08:00+00:00", episode=EPISODE, experiments=Experiments(episode=3, **fields),
        seconds=0.34,
    )  # fmt: skip


SPLIT = Split(
    jump=10.0, data_effect=9.9, weights_effect=0.0, interaction_effect=0.0, computation_effect=0.0,
    weights_error=0.01, excess=math.inf, noise=0.05, controls=8, batch_loss=(math.nan, math.nan),
    control_loss=(0.3, 0.3),
)  # fmt: skip
REPLAY = Replay(batches=35, recorded=math.nan, replayed=math.nan, differs_at=None)
ORIGIN = FirstNonFinite(phase="loss", module=None, operation="log")
WHOLE = scene(replay=REPLAY, split=SPLIT, first_nonfinite=ORIGIN, cost=Cost(steps=40, updates=35, worth=30.0))


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
    first, *rest = sentences.about(WHOLE.experiments)
    assert first == sentences.replay(REPLAY)
    assert "The jump is due to the batch (100 %)." in rest, "the conclusion needs the replay"
    expected = [
        "Episode 3: nonfinite at step 42 (epoch 2, batch 20) 0.31 → NaN",
        f"{sentences.replay(REPLAY)} It took 0.3 s on cpu.",
        "what made the loss jump: the batch",
        *(f"• {sentence}" for sentence in rest),
        "File: run/spike/replay.json",
    ]
    assert " ".join(" ".join(lines[2:]).split()) == " ".join(expected)


OUTSIDE = OutsideChange(
    ordinal=84, step=42, kind="weights", writes=(), different=(), eval_modules=None, loss_with_change=4.0, repaired=0.98
)
CASES = {
    "outside": ({"replay": REPLAY, "outside_change": OUTSIDE}, "jump: something outside the training step"),
    "inexact": (
        {"replay": dataclasses.replace(REPLAY, replayed=None, failure="no reason"), "split": SPLIT},
        "is not exact: no reason.",
    ),
    "computation": (
        {"replay": REPLAY, "split": dataclasses.replace(SPLIT, jump=1.0, data_effect=0.0, computation_effect=1.0)},
        "jump: a changed computation",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_results_have_their_words(case):
    fields, words = CASES[case]
    assert words in " ".join(printed(report(scene(**fields))).split())


def test_why_nothing_was_run_again_and_notes_are_said():
    text = printed(report(scene(not_run="no batch is held"), notes=["The run was on cuda."]))
    assert "not replayed: no batch is held" in text
    assert "! The run was on cuda." in text
    assert "what made" not in text


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal_or_120_columns(width):
    assert max(map(len, printed(report(WHOLE), width=width).splitlines())) <= min(width, 120)


def test_a_terminal_without_unicode_gets_ascii():
    assert printed(report(WHOLE), encoding="ascii").isascii()


def test_the_file_is_strict_json_with_all_experiments(tmp_path):
    here = Replayed(**{f: getattr(WHOLE, f) for f in WHOLE.__slots__} | {"place": tmp_path / "scenes" / "episode_0003"})
    path = write_replay(report(here, notes=["A note."]), tmp_path / "replay.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    (told,) = content["scenes"]
    assert content["schema_version"] == 2
    assert content["notes"] == ["A note."]
    assert (told["path"], told["episode"], told["examined"]) == ("scenes/episode_0003", 3, True)
    assert told["onset"] == {"ordinal": 84, "step": 42, "epoch": 2, "batch_idx": 20}
    assert told["experiments"]["split"]["excess"] is None
    assert content["nonfinite"]["/scenes/0/experiments/split/excess"] == "Infinity"
    assert repr(from_plain(Experiments, with_nonfinite(content)["scenes"][0]["experiments"])) == repr(WHOLE.experiments)
    assert told["sentences"] == list(sentences.about(WHOLE.experiments))
