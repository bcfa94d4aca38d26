"""What each rank notes of an examination that all made."""

import dataclasses

import pytest
from lab.made import moment

from lightning_spike.experiments import (
    Experiments,
    FirstNonFinite,
    ModeMeasurement,
    ModuleMeasurement,
    SampleMeasurement,
)
from lightning_spike.ranks.merge_ranks import SAME_TROUBLE_BATCHES, SharedExamination, merge_experiments
from lightning_spike.records import Action, Episode, EpisodeKind

MODES = ModeMeasurement(train=1.0, eval=1.0, usual_train=None, usual_eval=None, frozen=())
BORN = FirstNonFinite(phase="loss", module=None, operation="log")


def episode(onset, number=1):
    return Episode(id=number, kind=EpisodeKind.SPIKE, onset=moment(onset), noticed=moment(onset), peak=moment(onset))


def shared(**fields):
    return SharedExamination(**{"rank": 1, "episode": episode(40), "found": None} | fields)


def test_another_ranks_episode_gets_the_experiments_under_its_own_number():
    replay = Action(action="replay", at=moment(44), detail={"episode": 1, "extent": "full"})
    examination = shared(found=Experiments(episode=1, modes=MODES), action=replay)
    own = episode(42, number=7)
    assert examination.is_about(own)
    found, action = examination.notes_about(own)
    assert found == Experiments(episode=7, modes=MODES)
    assert (action.at, action.detail) == (moment(44), {"episode": 7, "extent": "full"})


def test_what_the_ranks_agreed_not_to_examine_leaves_nothing():
    assert shared().notes_about(episode(42, number=7)) == []


@pytest.mark.parametrize(("onset", "same"), [(40 - SAME_TROUBLE_BATCHES, True), (41 + SAME_TROUBLE_BATCHES, False)])
def test_it_is_one_trouble_only_if_the_onsets_are_near(onset, same):
    assert shared().is_about(episode(onset)) is same


def test_a_single_rank_has_nothing_to_merge():
    mine = Experiments(episode=1, modes=MODES)
    assert merge_experiments([mine], by=0) is mine


def test_what_is_about_one_ranks_batch_says_whose():
    modules = ModuleMeasurement(modules=())
    samples = SampleMeasurement(
        losses=(2.0, 9.1), usual_losses=(2.1, 2.2), gradient_bounds=None, usual_gradient_bounds=None, hardest=(1,),
        gradients=(31.0,), usual_gradient=1.2,
    )  # fmt: skip
    mine = Experiments(episode=1, modules=modules, samples=samples, modes=MODES)
    found = merge_experiments([Experiments(episode=1, modules=modules), mine], by=1)
    assert (found.rank, found.world_size) == (1, 2)
    assert found.modules == dataclasses.replace(modules, rank=1)
    assert found.samples == dataclasses.replace(samples, rank=1)
    assert found.modes == MODES


def test_where_a_value_was_born_may_be_known_to_another_rank_only():
    elsewhere = [Experiments(episode=1), Experiments(episode=1, first_nonfinite=BORN)]
    assert merge_experiments(elsewhere, by=0).first_nonfinite == dataclasses.replace(BORN, rank=1)
    both = [Experiments(episode=1, first_nonfinite=dataclasses.replace(BORN, operation="exp")), elsewhere[1]]
    assert merge_experiments(both, by=1).first_nonfinite == dataclasses.replace(BORN, rank=1)
