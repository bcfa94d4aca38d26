"""The run again, from its first snapshot: the same losses and the same weights, to the bit."""

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from training_tasks import TASKS, Digits, train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.lab.errors import CannotReplay
from lightning_spike.lab.isolation import isolated
from lightning_spike.lab.reproduce import reproduce
from lightning_spike.lab.state import TrainState
from lightning_spike.store import TrainerStateStore

LAST = 40


class OneCycle(Digits):
    """Rate and momentum both move with every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Probe(Callback):
    """At the end of one batch, runs everything up to it again; `change` may touch what it is run from."""

    def __init__(self, suite, change=lambda entries: entries):
        self.suite, self.change, self.count, self.again, self.error = suite, change, -1, None, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == LAST:
            self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.count != LAST:
            return
        history = TrainerStateStore.of(trainer).history
        self.recorded = {k: history.at("loss", k) for k in range(LAST + 1)}
        entries = self.change(self.suite._witnesses.ring.entries())
        snapshot = self.suite._witnesses.snapshots.latest_healthy(before=LAST)
        with isolated(trainer, pl_module, with_optimizers=True) as bench:
            try:
                self.again = reproduce(
                    bench, TrainState.of(snapshot), entries, self.suite._witnesses.settings.by_ordinal, self.recorded
                )
            except CannotReplay as error:
                self.error = str(error)


def probed(make, tmp_path, change=lambda entries: entries, **options):
    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    probe = Probe(suite, change)
    train(make(), [suite, probe], tmp_path, max_steps=-1, **{"max_epochs": 2, **options})
    return probe


CASES = {name: task for name, task in TASKS.items() if name != "two_by_hand"} | {
    "one-cycle": (OneCycle, {"gradient_clip_val": 0.5}),
    "bf16": (Digits, {"precision": "bf16-mixed"}),
    "double": (Digits, {"precision": "64-true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_come_out_to_the_bit(case, tmp_path):
    make, options = CASES[case]
    probe = probed(make, tmp_path, **options)
    assert probe.error is None
    assert (probe.again.steps, probe.again.reached, probe.again.differs_at) == (LAST, LAST, None)
    assert probe.again.replayed == probe.recorded[LAST]
    assert all(torch.equal(probe.again.weights[name], value) for name, value in probe.weights.items())


def test_a_loss_that_was_another_is_seen_at_its_batch(tmp_path):
    class Meddled(Probe):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self.count == 25:
                with torch.no_grad():
                    pl_module.net[-1].weight.mul_(3)

    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    probe = Meddled(suite)
    train(Digits(), [suite, probe], tmp_path, max_epochs=2)
    assert probe.again.differs_at == 25


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda entries: entries[1:], "not all batches", id="gap"),
        pytest.param(lambda entries: [dataclasses.replace(e, mutated=True) for e in entries], "in place", id="mutated"),
    ],
)
def test_what_is_missing_is_said(change, reason, tmp_path):
    probe = probed(Digits, tmp_path, change)
    assert reason in probe.error


class Annealed(Digits):
    """A loss that reads where in the run it is, and whose gradient at one step is not finite: the root of zero has an infinite slope."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * self.global_step + self.current_epoch)
        return loss + (self.net[0].weight.sum() * 0).sqrt() if self.global_step == 38 else loss


def test_it_stops_at_the_first_gradient_that_is_not_finite(tmp_path):
    probe = probed(Annealed, tmp_path)
    assert (probe.again.reached, probe.again.differs_at) == (38, None)
    assert probe.again.replayed == probe.recorded[38]
    assert all(value.isfinite().all() for value in probe.again.weights.values())
