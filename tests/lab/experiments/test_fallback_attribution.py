"""Who is to blame where the beginning of a trouble is out of reach."""

import pytest
from lab.made import moment

from lightning_spike.lab.experiments.fallback_attribution import (
    blamed_on_steps,
    steps_too_long,
    told_before,
    unexplained,
)
from lightning_spike.lab.experiments.step_size import Consistency
from lightning_spike.records import Episode, EpisodeKind, Finding, RunFacts, StepRow
from lightning_spike.store import TrainerStateStore

STEPS = Consistency(rho=0.3, worsened=0.3, against=0.0, overshot=0.3, updates=24)


def store(*findings, rates=(0.1, 0.1)):
    made = TrainerStateStore(RunFacts(started="2026-01-01T00:00:00Z"))
    for ordinal in range(100):
        made.append(StepRow(at=moment(ordinal), values={"loss": 1.0, "lr-SGD": rates[ordinal >= 50]}))
    made.note(*findings)
    return made


def episode(onset=80):
    return Episode(
        id=3, kind=EpisodeKind.DIVERGENCE, onset=moment(onset), noticed=moment(99), peak=moment(99), severity=9
    )


def found(kind="steps_too_long", at=20, **detail):
    return Finding(detector="lab", kind=kind, at=moment(at), detail={**steps_too_long(STEPS), **detail})


def test_what_was_found_before_holds_while_the_rate_is_the_same():
    assert told_before(store(found()), episode()) is not None
    assert told_before(store(found(), rates=(0.1, 0.02)), episode()) is None
    assert told_before(store(found(at=90)), episode()) is None
    assert told_before(store(), episode()) is None


@pytest.mark.parametrize(("first", "counts"), [("intrinsic", True), ("data", False)])
def test_an_earlier_episode_that_was_blamed_on_the_steps_counts_too(first, counts):
    blamed = found(kind="blame", first=first, episode=1)
    assert (told_before(store(blamed), episode()) is not None) is counts


@pytest.mark.parametrize("steps", [STEPS, found()], ids=["the-present", "found-before"])
def test_all_of_it_is_the_steps_and_why_the_moment_is_missing_is_said(steps):
    findings = blamed_on_steps(episode(), "the batch is gone", steps)
    blame = next(f for f in findings if f.kind == "blame").detail
    assert blame["shares"]["intrinsic"] == 1.0
    assert sum(blame["shares"].values()) == 1.0
    assert "the batch is gone" in blame["text"]
    assert {f.detail["episode"] for f in findings} == {3}


def test_only_what_an_examination_left_open_is_asked_again():
    def split(**detail):
        return Finding(detector="lab", kind="split", at=moment(80), detail=detail)

    gone = split(exact=False, verdict="weights", why_not_exact="not all batches are held")
    assert unexplained([gone]) == "not all batches are held"
    assert unexplained([gone, found(kind="blame", first="data")]) is None
    assert unexplained([split(exact=True, verdict="weights", why_not_exact=None)]) is None
    assert unexplained([split(exact=False, verdict="data", why_not_exact="gone")]) is None
    assert unexplained([]) is None
