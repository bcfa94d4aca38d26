"""What each rank tells of an examination that all made."""

import pytest
from lab.made import moment
from lightning_spike.lab.experiments.findings import not_run

from lightning_spike.ranks.merge_ranks import SAME_TROUBLE, Examined, merged
from lightning_spike.records import Action, Episode, EpisodeKind, Finding


def episode(onset, number=1):
    return Episode(id=number, kind=EpisodeKind.SPIKE, onset=moment(onset), noticed=moment(onset), peak=moment(onset))


def finding(kind, text, **detail):
    return Finding(detector="lab", kind=kind, at=moment(40), detail={"episode": 1, "text": text, **detail})


def test_another_ranks_episode_gets_the_findings_under_its_own_number():
    replay = Action(action="replay", at=moment(44), detail={"episode": 1, "extent": "full"})
    examined = Examined(rank=1, episode=episode(40), notes=(finding("split", "so"), replay))
    own = episode(42, number=7)
    assert examined.is_about(own)
    split, action = examined.notes_about(own)
    assert (split.at, split.detail) == (moment(42), {"episode": 7, "text": "so"})
    assert (action.at, action.detail) == (moment(44), {"episode": 7, "extent": "full"})


@pytest.mark.parametrize(("onset", "same"), [(40 - SAME_TROUBLE, True), (41 + SAME_TROUBLE, False)])
def test_it_is_one_trouble_only_if_the_onsets_are_near(onset, same):
    assert Examined(rank=1, episode=episode(40), notes=()).is_about(episode(onset)) is same


def test_a_rank_that_saw_nothing_says_so_and_what_it_was():
    notes = (finding("split", "A split."), finding("calm", "left out"), finding("blame", "A blame."))
    assert Examined(rank=3, episode=episode(40), notes=notes).remark == (
        "Rank 3 saw a spike at step 40; this rank's loss did not show it. A split. A blame."
    )
    refused = Examined(rank=3, episode=episode(40), notes=(not_run(episode(40), "it is too late"),))
    assert refused.remark.endswith("did not show it. It was not run again: it is too late.")


def test_what_is_about_one_ranks_batch_says_whose():
    mine = [finding("split", "S.", verdict="data"), finding("measured", "M.", what="samples")]
    other = [finding("measured", "O.", what="samples"), finding("measured", "P.", what="modes")]
    told = merged([other, [*mine, other[1]]], by=1)
    assert [f.detail["text"] for f in told] == ["S. (Means over 2 ranks; rank 1 saw it.)", "On rank 1: M.", "P."]
    assert merged([mine], by=0) == mine


def test_where_a_value_was_born_may_be_known_to_another_rank_only():
    told = merged([[finding("split", "S.")], [finding("split", "S."), finding("nonfinite_origin", "In a log.")]], by=0)
    assert [(f.kind, f.detail["rank"]) for f in told] == [("nonfinite_origin", 1), ("split", 0)]
    assert told[0].detail["text"] == "On rank 1: In a log."
