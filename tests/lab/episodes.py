"""Trainings with one episode, examined by the lab: what it measured."""

from lightning.pytorch import Callback, seed_everything
from training_tasks import train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.diagnosis.judgement import jump_shares
from lightning_spike.store import TrainerStateStore

SIZE = 16
LATE = 284
"""A batch by which the detector knows the noise, 34 after a snapshot."""


class At(Callback):
    """Does something to the run at one batch, counted over the run: before it, or just before the optimizer's step."""

    def __init__(self, ordinal, start=None, end=None):
        self.ordinal, self.start, self.end, self.count = ordinal, start, end, -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.start and self.count == self.ordinal:
            self.start(trainer, pl_module, batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.end and self.count == self.ordinal:
            self.end(trainer, pl_module, optimizer)


def examined(make, tmp_path, *faults, epochs=9, **options):
    """The trainer of a run with these faults, which stand before the suite, so that it sees what they have done."""
    seed_everything(0, verbose=False)
    return train(make(), [*faults, CounterfactualReplay()], tmp_path, max_epochs=epochs, batch_size=SIZE, **options)


def measured(trainer, episode=1):
    """What the lab measured about one episode."""
    return TrainerStateStore.of(trainer).experiments[episode]


def shares(trainer, episode=1):
    """The shares of the jump above 0 that follow from it."""
    return {group: share for group, share in jump_shares(measured(trainer, episode)).items() if share}


def first(trainer, episode=1):
    """The group with the largest share."""
    found = shares(trainer, episode)
    return max(found, key=found.get)
