"""Named samples as a factor."""

import dataclasses

import torch
from lab.made import around, entry, leg

from lightning_spike.lab.experiments.factors import NamedSamples

OWN, ORDINARY = torch.arange(4.0), torch.arange(10.0, 14.0)


def update():
    return dataclasses.replace(leg(9).update, entries=(entry(8, OWN), entry(9, OWN + 100)))


def test_ordinary_samples_take_the_places_of_the_named_ones():
    there = dataclasses.replace(around([leg(9)], controls=[entry(3, ORDINARY)]), named={9: (1, 3)})
    normal = NamedSamples().normal(update(), there)
    assert [e.batch.tolist() for e in normal.entries] == [OWN.tolist(), [100, 11, 102, 13]]
    assert [e.at.ordinal for e in normal.entries] == [8, 9]


def test_where_none_are_named_it_is_no_factor():
    assert NamedSamples().normal(update(), around([leg(9)], controls=[entry(3, ORDINARY)])) is None


def test_where_the_batches_do_not_fit_together_it_is_no_factor():
    there = dataclasses.replace(around([leg(9)], controls=[entry(3, torch.zeros(4, 2))]), named={9: (1, 3)})
    assert NamedSamples().normal(update(), there) is None
