"""What the optimizer's state held when the lab blames it: the gradient that exploded before, or nothing of the kind."""

import pytest
from lab_results import attribution, experiments, with_shares
from synthetic import Run, an_episode

from lightning_spike.diagnosis.observations.gradient_in_state import exploded_gradient_in_state
from lightning_spike.diagnosis.view import EpisodeView


def told(*, exploded=197, times=100.0, first=198, group="optimizer"):
    run = Run(0)
    run.grad[exploded] *= times
    run.episodes = [an_episode(200, 202, 240, before=0.35)]
    fields = with_shares(**{group: 1.0})
    fields["attribution"] = None if first is None else attribution({group: 1.0}, ordinal=first)
    run.note(experiments(**fields))
    store = run.store()
    return exploded_gradient_in_state(EpisodeView(store, store.episodes[0]))


def test_the_gradient_before_the_updates_that_were_examined():
    assert told().ordinal == 197


@pytest.mark.parametrize(
    "options",
    [{"times": 3.0}, {"exploded": 198}, {"first": None}, {"group": "data"}, {"times": float("inf")}],
    ids=["merely large", "examined itself", "not examined", "the batch is to blame", "not finite"],
)
def test_else_it_holds_none(options):
    assert told(**options) is None
