"""What ranks agree on, with a thread for each and a meeting place in place of gloo.

With real processes in tests/callbacks/test_counterfactual_replay_ranks.py.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lightning_spike.errors import CannotReplay
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks, RanksAborted, RankUnreachable, mean_of


class Place:
    """Where all ranks lay down what they have, and take up what the others have."""

    def __init__(self, world):
        self.world, self.things, self.barrier = world, [None] * world, threading.Barrier(world, timeout=5)

    def meet(self, rank, thing):
        self.things[rank] = thing
        self.barrier.wait()
        everybody = list(self.things)
        self.barrier.wait()
        return everybody


class Group:
    def __init__(self, place, rank):
        self.place, self.rank, self.world = place, rank, place.world

    def send(self, row):
        return Sent(np.stack(self.place.meet(self.rank, np.array(row))))

    def gather(self, thing):
        return self.place.meet(self.rank, thing)

    def broadcast(self, thing, *, by):
        return self.place.meet(self.rank, thing)[by]


class Sent:
    def __init__(self, rows):
        self.rows = rows

    def table(self, seconds=None):
        return self.rows


def fail(error):
    raise error


def on_all(work, world=2):
    """What `work(ranks)` gives, or raises, on each of them."""
    place = Place(world)

    def one(rank):
        try:
            return work(Ranks(Group(place, rank)))
        except Exception as error:  # noqa: BLE001 - it is looked at
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def test_all_have_the_mean_of_each_number():
    table = np.random.default_rng(0).normal(size=(3, 40))
    for mean in on_all(lambda ranks: ranks.mean("losses", table[ranks.rank]), world=3):
        assert mean == pytest.approx(table.mean(axis=0), rel=1e-15)


def test_what_is_not_finite_on_one_is_on_none():
    values = [[1.0, math.nan, math.inf, math.inf], [3.0, 1.0, 1.0, -math.inf]]
    for mean in on_all(lambda ranks: ranks.mean("losses", values[ranks.rank])):
        assert mean.tolist() == pytest.approx([2.0, math.nan, math.inf, math.nan], nan_ok=True)


def test_the_mean_does_not_depend_on_the_order_of_the_ranks():
    values = np.random.default_rng(1).lognormal(sigma=9.0, size=100)
    assert mean_of(values) == mean_of(values[::-1]) == pytest.approx(values.mean())


def test_one_is_enough_and_the_first_decides():
    for rank in on_all(lambda r: (r.any("q", mine=r.rank == 1), r.any("q", mine=False), r.first("p", 7 + r.rank))):
        assert rank == (True, False, 7)


def test_things_are_gathered_and_told():
    for found in on_all(lambda r: (r.gather({"rank": r.rank}), r.broadcast(f"by {r.rank}", by=1))):
        assert found == ([{"rank": 0}, {"rank": 1}], "by 1")


@pytest.mark.parametrize("further", [0, 1, 20])
def test_a_stage_that_fails_on_one_fails_on_all_wherever_the_others_are(further):
    def work(ranks):
        with ranks.stage():
            ranks.barrier("the beginning")
            if ranks.rank == 1:
                fail(ValueError("no luck"))
            ranks.mean("losses", [0.0] * further)

    for error in on_all(work, world=3):
        assert isinstance(error, RanksAborted)
        assert str(error) == "on rank 1, the replay failed: ValueError: no luck"


def test_after_a_stage_that_failed_they_go_on_together():
    def work(ranks):
        with ranks.stage():
            try:
                with ranks.stage():
                    if ranks.rank == 0:
                        fail(CannotReplay("it is not held"))
                    ranks.gather("something")
            except CannotReplay as reason:
                return str(reason), ranks.mean("losses", [ranks.rank])[0]

    assert on_all(work) == [("on rank 0, it is not held", 0.5)] * 2


def test_what_none_can_do_is_no_single_ranks_fault():
    def work(ranks):
        with ranks.stage():
            fail(CannotReplay("it is not held"))

    assert [str(error) for error in on_all(work)] == ["it is not held"] * 2


@pytest.mark.parametrize(
    "work",
    [
        lambda ranks: ranks.barrier(f"place {ranks.rank}"),
        lambda ranks: ranks.barrier("a training step", ranks.rank),
        lambda ranks: ranks.mean("losses", [1.0] * (1 + ranks.rank)),
    ],
    ids=["question", "number", "length"],
)
def test_ranks_that_have_come_to_different_places_leave_together(work):
    for error in on_all(work):
        assert isinstance(error, RanksAborted)
        assert "different places" in str(error)


def test_a_rank_that_does_not_answer_is_out_of_reach_and_not_waited_for_again():
    class Gone(Group):
        asked = 0

        def send(self, row):
            Gone.asked += 1
            fail(RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"))

    ranks = Ranks(Gone(Place(2), 0))
    for _ in range(3):
        with pytest.raises(RankUnreachable, match=r"did not answer \(Connection closed by peer"), ranks.stage():
            pass
    assert Gone.asked == 1


def test_alone_everything_is_as_it_is_and_errors_pass():
    assert SINGLE_RANK.mean("losses", [1.0, 2.0]).tolist() == [1.0, 2.0]
    assert SINGLE_RANK.any("q", mine=True)
    assert (SINGLE_RANK.first("p", 3), SINGLE_RANK.gather("x"), SINGLE_RANK.broadcast("y", by=0)) == (3, ["x"], "y")
    SINGLE_RANK.barrier("anywhere")
    with pytest.raises(ValueError, match="as it is"), SINGLE_RANK.stage():
        fail(ValueError("as it is"))
