"""What the tests of the monitors share: one run with some callbacks, and what was found in it."""

import torch
from training_tasks import build, train

from lightning_spike.store import TrainerStateStore


def watched(task, callbacks, root, **options):
    """Train a task with `callbacks`; the store of the run."""
    module, own = build(task)
    return store_of(module, callbacks, root, **(own | options))


def store_of(module, callbacks, root, **options):
    torch.set_num_threads(1)
    store = TrainerStateStore.of(train(module, callbacks, root, **options))
    assert store.disabled == []
    return store


def found(store, detector):
    return [(f.kind, f.at.ordinal) for f in store.findings if f.detector == detector]


def recorded(store, signal):
    return store.history.series(signal)[store.history.present(signal)]
