"""What stands in for a replay where the onset is out of reach."""

import dataclasses

import pytest
from lab.made import moment

from lightning_spike.experiments import Experiments, FirstNonFinite, Replay, Split, StepSize, StepSizeTest
from lightning_spike.lab.experiments.fallback_attribution import earlier_step_size, unexplained, with_step_size
from lightning_spike.records import Episode, EpisodeKind, RunFacts, StepRow
from lightning_spike.store import TrainerStateStore

STEPS = StepSize(rho=0.3, worsened=0.3, against=0.0, overshot=0.3, updates=24, source="present")
ORDINARY = StepSize(rho=0.95, worsened=0.0, against=0.0, overshot=0.0, updates=24, source="present")


def store(*found, rates=(0.1, 0.1)):
    made = TrainerStateStore(RunFacts(started="2026-01-01T00:00:00Z"))
    for ordinal in range(100):
        made.append(StepRow(at=moment(ordinal), values={"loss": 1.0, "lr-SGD": rates[ordinal >= 50]}))
    made.note(*found)
    return made


def episode(onset=80, id_=3):
    return Episode(
        id=id_, kind=EpisodeKind.DIVERGENCE, onset=moment(onset), noticed=moment(99), peak=moment(99), severity=9
    )


def a_test(at=20, result=STEPS):
    return StepSizeTest(at=moment(at), result=result)


def test_an_earlier_test_holds_while_the_rate_is_the_same():
    found = earlier_step_size(store(a_test()), episode())
    assert found == dataclasses.replace(STEPS, source="earlier", at_step=20)
    assert earlier_step_size(store(a_test(), rates=(0.1, 0.02)), episode()) is None
    assert earlier_step_size(store(a_test(at=90)), episode()) is None
    assert earlier_step_size(store(a_test(result=ORDINARY)), episode()) is None
    assert earlier_step_size(store(), episode()) is None


@pytest.mark.parametrize(("steps", "counts"), [(STEPS, True), (ORDINARY, False)])
def test_an_earlier_episode_whose_steps_were_too_long_counts_too(steps, counts):
    made = store(Experiments(episode=1, failure="no snapshot", step_size=steps))
    made.replace_episode(episode(onset=40, id_=1))
    found = earlier_step_size(made, episode())
    assert (found is not None) is counts
    assert found is None or (found.source, found.at_step) == ("earlier", 40)


def test_the_step_sizes_stand_beside_what_else_was_measured_and_why_there_is_no_replay():
    split = Split(
        jump=1.0, data_effect=0.0, weights_effect=1.0, interaction_effect=0.0, computation_effect=0.0,
        weights_error=0.01, excess=0.0, noise=0.01, controls=8, batch_loss=(0.3, 1.3), control_loss=(0.3, 1.3),
    )  # fmt: skip
    found = with_step_size(Experiments(episode=3, split=split), episode(), "the batch is gone", STEPS)
    assert (found.split, found.failure, found.step_size) == (split, "the batch is gone", STEPS)
    assert with_step_size(None, episode(), "gone", STEPS) == Experiments(episode=3, failure="gone", step_size=STEPS)


def test_only_what_an_examination_left_open_is_asked_again():
    def split(**effects):
        ordinary = {"data_effect": 0.0, "weights_effect": 0.0, "interaction_effect": 0.0, "computation_effect": 0.0}
        return Split(
            jump=1.0, weights_error=0.01, excess=0.0, noise=0.01, controls=8, batch_loss=(0.3, 1.3),
            control_loss=(0.3, 1.3), **ordinary | effects,
        )  # fmt: skip

    def replay(failure):
        return Replay(batches=8, recorded=1.3, replayed=None, differs_at=None, failure=failure)

    def found(**fields):
        return Experiments(episode=1, **fields)

    gone, weights = replay("not all batches are held"), split(weights_effect=1.0)
    assert unexplained(found(replay=gone, split=weights)) == "not all batches are held"
    born = FirstNonFinite(phase="input", module=None, operation="batch[0]")
    assert unexplained(found(replay=gone, split=weights, first_nonfinite=born)) is None
    assert unexplained(found(replay=replay(None), split=weights)) is None
    assert unexplained(found(replay=gone, split=split(data_effect=1.0))) is None
    assert unexplained(found()) is None
