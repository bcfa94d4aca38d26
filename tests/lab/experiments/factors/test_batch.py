"""The batch as a factor."""

import dataclasses

from lab.made import around, entry, leg

from lightning_spike.lab.experiments.factors import Batch


def test_ordinary_batches_take_the_place_of_those_of_the_update_which_stay_where_they_were():
    controls = [entry(3), entry(5)]
    update = dataclasses.replace(leg(9).update, entries=(entry(8), entry(9), entry(10)))
    normal = Batch().normal(update, around([leg(9)], controls=controls))
    assert [e.batch for e in normal.entries] == [[3], [5], [3]]
    assert [e.at.ordinal for e in normal.entries] == [8, 9, 10]
    assert normal.settings == update.settings


def test_without_an_ordinary_batch_it_cannot_be_tried():
    assert Batch().normal(leg(9).update, around([leg(9)])) is None
