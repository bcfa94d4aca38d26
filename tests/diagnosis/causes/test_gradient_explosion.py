"""A gradient that exploded and did its harm out of the optimizer's state, some updates later."""

from lab_results import LabResult
from synthetic import ADAMW, Run, an_episode, said_of

from lightning_spike.diagnosis.rank import diagnose


def a_run(*, exploded, odd=False):
    run = Run(0, optimizer=ADAMW)
    run.bump(200, 9.0, 15)
    if exploded:
        run.grad[195] *= 800.0
    if odd:
        run.odd_batch(195, 30.0)
    run.episodes = [an_episode(200, 202, 240, height=run.loss[202], before=0.35)]
    finer = [{"factor": "momentum", "group": "optimizer", "share": 0.9}]
    for kind, detail in (("blame", {"shares": {"optimizer": 0.9}}), ("factors", {"ordinal": 197, "finer": finer})):
        run.note(LabResult(kind, {"episode": 1, **detail}))
    return run


def test_a_state_that_holds_an_exploded_gradient_is_the_explosion_and_no_reversal_of_the_momentum():
    first, *rest = diagnose(a_run(exploded=True).store()).overall
    assert (first.cause, first.probability > 0.5) == ("gradient_explosion", True)
    assert all(v.probability < 0.2 for v in rest)
    with_it, without = (a_run(exploded=exploded).store() for exploded in (True, False))
    totals = [said_of("momentum_reversal", s, s.episodes[0]).total for s in (with_it, without)]
    assert totals[0] < totals[1] - 3.0


def test_an_odd_batch_has_an_odd_gradient():
    told = {v.cause: v.probability for v in diagnose(a_run(exploded=True, odd=True).store()).overall}
    assert told.get("gradient_explosion", 0.0) < 0.5


def test_without_an_exploded_gradient_the_state_says_nothing_for_it():
    told = {v.cause: v.probability for v in diagnose(a_run(exploded=False).store()).overall}
    assert told.get("gradient_explosion", 0.0) < 0.1
