import dataclasses
import math

import pytest

from lightning_spike.records import Action, Moment
from lightning_spike.report.wording import (
    actions_words,
    count,
    duration,
    episodes_words,
    loss_words,
    number,
    percent,
    steps_words,
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.0, "0"),
        (4.05123, "4.05"),
        (1200.0, "1,200"),
        (-3.0, "-3"),
        (1e-7, "1e-07"),
        (1234567.0, "1.23e+06"),
        (math.nan, "NaN"),
        (math.inf, "Inf"),
        (-math.inf, "-Inf"),
    ],
    ids=str,
)
def test_numbers(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("probability", "said"),
    [(0.0, "0 %"), (0.004, "<1 %"), (0.05, "5 %"), (0.914, "91 %"), (0.999, ">99 %"), (1.0, "100 %")],
)
def test_percentages_claim_no_certainty(probability, said):
    assert percent(probability) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_counts():
    assert (count(1, "step"), count(0, "step"), count(1200, "step")) == ("1 step", "0 steps", "1,200 steps")


@pytest.mark.parametrize(
    ("ids", "said"),
    [((), "the whole run"), ((3,), "episode 3"), ((1, 2, 3, 7), "episodes 1–3, 7"), ((2, 1), "episodes 1–2")],
)
def test_episodes_are_named_by_spans(ids, said):
    assert episodes_words(ids) == said


def test_an_episode_in_words(troubled):
    first, second = troubled.episodes
    assert (steps_words(first), steps_words(second)) == ("400–431", "800–…")
    assert steps_words(dataclasses.replace(first, end=first.onset)) == "400"
    assert (loss_words(first), loss_words(second)) == ("0.18 → 4 (×22)", "0.031 → NaN")
    assert loss_words(dataclasses.replace(first, signal="val_loss")) == "val_loss 0.18 → 4 (×22)"
    assert loss_words(dataclasses.replace(first, loss_before=None, loss_peak=None)) == "–"


def test_dumps_of_an_episode_are_one_line():
    def did(action, step, **detail):
        return Action(action=action, at=Moment(ordinal=step, step=step, epoch=0, batch_idx=step), detail=detail)

    actions = [
        did("dump", 61, episode=1, path="batches/a", role="onset", suspects=[{}]),
        did("rollback", 65, to_step=40, lr_scale=0.5, healed=True, nothing=None),
        did("dump", 60, episode=1, path="batches/b", role="neighbour"),
        did("dump", 70, episode=2, path="batches/c"),
        did("early_stop", 99),
    ]
    assert actions_words(actions) == [
        "episode 1: the batch of step 61 is in batches/a, with 1 of its neighbours",
        "rollback at step 65: to_step 40, lr_scale 0.5, healed True",
        "episode 2: the batch of step 70 is in batches/c",
        "early stop at step 99",
    ]
