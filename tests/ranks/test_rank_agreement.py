"""Whose episode comes first."""

import numpy as np
import pytest

from lightning_spike.ranks.rank_agreement import ExaminationRequest, strongest

NONE = [-1.0, 0.0]


@pytest.mark.parametrize(
    ("table", "winner"),
    [
        ([NONE, NONE], None),
        ([NONE, [5.0, 40.0]], ExaminationRequest(rank=1, severity=5.0, onset=40)),
        ([[9.0, 50.0], [5.0, 40.0]], ExaminationRequest(rank=0, severity=9.0, onset=50)),
        ([[99.0, 41.0], [99.0, 40.0]], ExaminationRequest(rank=1, severity=99.0, onset=40)),
        ([NONE, [0.0, 7.0], [0.0, 7.0]], ExaminationRequest(rank=1, severity=0.0, onset=7)),
    ],
)
def test_the_most_severe_then_the_earliest_then_the_lowest_rank(table, winner):
    assert strongest(np.array(table)) == winner
