"""What the optimizer's state held when the lab blames it: the gradient that exploded before, or nothing of the kind."""

import pytest
from synthetic import Run, an_episode, moment

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.observations.held import held_gradient
from lightning_spike.records import Finding


def told(*, exploded=197, times=100.0, first=198, group="optimizer"):
    run = Run(0)
    run.grad[exploded] *= times
    run.episodes = [an_episode(200, 202, 240, before=0.35)]
    for kind, detail in (("blame", {"shares": {group: 0.9}}), ("factors", {"ordinal": first})):
        run.note(Finding(detector="lab", kind=kind, at=moment(200), detail={"episode": 1, **detail}))
    store = run.store()
    return held_gradient(Case(store, store.episodes[0]))


def test_the_gradient_before_the_updates_that_were_examined():
    assert told().ordinal == 197


@pytest.mark.parametrize(
    "options",
    [{"times": 3.0}, {"exploded": 198}, {"first": None}, {"group": "data"}, {"times": float("inf")}],
    ids=["merely large", "examined itself", "not examined", "the batch is to blame", "not finite"],
)
def test_else_it_holds_none(options):
    assert told(**options) is None
