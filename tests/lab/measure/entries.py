"""Ring entries made by hand."""

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.records import Moment
from lightning_spike.signals.random_state import RandomState


def moment(ordinal=0):
    return Moment(ordinal=ordinal, step=ordinal, epoch=0, batch_idx=ordinal)


def entry(batch, ordinal=0):
    return RingEntry(at=moment(ordinal), batch=batch, ids=None, rng=RandomState.take())
