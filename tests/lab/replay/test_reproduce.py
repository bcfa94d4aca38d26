"""The run again, from its first snapshot: the same losses and the same weights, to the bit."""

import collections
import copy
import dataclasses

import pytest
import torch
from lab.shapes import Counters, Ema, GrowingLists, Metrics, Randomness, Recurrent
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torchmetrics import MeanMetric
from training_tasks import TASKS, Digits, train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.errors import CannotReplay
from lightning_spike.lab.live_scene import recorded_losses
from lightning_spike.lab.replay.reproduce import go_on, reproduce
from lightning_spike.ranks.control_group import ControlGroup
from lightning_spike.ranks.rank_coordination import Ranks
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState
from lightning_spike.store import TrainerStateStore

LAST = 40


class OneCycle(Digits):
    """Rate and momentum both move with every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Gru(Digits):
    """The rows of an image as a sequence, with dropout between the layers, and a hidden state that is carried from
    batch to batch."""

    def __init__(self):
        super().__init__(0.01)
        self.gru = nn.GRU(8, 12, num_layers=2, dropout=0.3, batch_first=True)
        self.net = nn.Linear(12, 10)
        self.hidden = None

    def forward(self, x):
        output, hidden = self.gru(x.squeeze(1), self.hidden)
        self.hidden = hidden.detach()
        return self.net(output[:, -1])


class Gan(LightningModule):
    """Two optimizers, toggled by turns, a schedule stepped by hand in the middle, gradients of two batches summed by
    hand in one of them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))
        self.judge = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        maker, judge = self.optimizers()
        schedule, _ = self.lr_schedulers()
        self.toggle_optimizer(maker)
        made = self.maker(torch.randn(len(real), 4))
        maker.zero_grad()
        self.manual_backward(F.softplus(-self.judge(made)).mean() * (1 + 0.01 * self.global_step))
        maker.step()
        schedule.step()
        self.untoggle_optimizer(maker)
        with self.toggled_optimizer(judge):
            loss = F.softplus(-self.judge(real)).mean() + F.softplus(self.judge(made.detach())).mean()
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                self.clip_gradients(judge, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                judge.step()
                judge.zero_grad()
        self.log("judge", loss)

    def configure_optimizers(self):
        maker = torch.optim.AdamW(self.maker.parameters(), lr=0.01)
        judge = torch.optim.SGD(self.judge.parameters(), lr=0.05, momentum=0.9)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(maker, 0.01, total_steps=64)
        return [maker, judge], [one_cycle, torch.optim.lr_scheduler.ConstantLR(judge)]


class ReturnsItsLoss(Digits):
    """Manual optimisation with a closure, past Lightning's wrapper of the optimizer every other time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=bool(batch_idx % 2))

        def closure():
            optimizer.zero_grad()
            self.loss = super(ReturnsItsLoss, self).training_step(batch, batch_idx)
            self.manual_backward(self.loss)

        optimizer.step(closure) if batch_idx % 2 else (closure(), optimizer.step())
        return self.loss.detach()


class Teacher(Digits):
    """A slow copy of the weights that follows in a hook, a counter in another, a loss that depends on both, and a
    metric."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.mean = MeanMetric()
        self.beta, self.recent, self.count = 0.5, collections.deque(maxlen=4), {"begun": 0}

    def on_train_batch_start(self, batch, batch_idx):
        self.count["begun"] += 1
        self.beta *= 0.99

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.recent.append(loss.detach())
        pull = F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))
        return loss + self.beta * pull + 0.01 * self.count["begun"] * (self.mean.compute() + sum(self.recent))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


class Unfreezes(Digits):
    """Its first layer takes no gradient until batch 30."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(self.global_step >= 30)


class Lbfgs(Digits):
    """Runs its training step several times for each update."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3, history_size=4)


def loss_scaler():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=9))]}


class Probe(Callback):
    """At the end of one batch, runs everything up to it again; `change` may touch what it is run from."""

    reproduce = staticmethod(reproduce)

    def __init__(self, suite, change=lambda entries: entries):
        self.suite, self.change, self.count, self.again, self.error = suite, change, -1, None, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == LAST:
            self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
            self.states = copy.deepcopy([o.state_dict()["state"] for o in trainer.optimizers])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.count != LAST:
            return
        history = TrainerStateStore.of(trainer).history
        mine = recorded_losses(history, range(LAST + 1))
        of_all = trainer.strategy.all_gather(torch.tensor(list(mine.values()), dtype=torch.float64))
        self.recorded = dict(zip(mine, of_all.reshape(-1, len(mine)).mean(0).tolist(), strict=True))
        _, snapshot, *_ = self.suite._witnesses.snapshots.verified(before=LAST)
        self.first = snapshot.at.ordinal
        held = self.suite._witnesses.ring.entries()
        entries = self.change([entry for entry in held if entry.at.ordinal >= self.first])
        ranks = Ranks(ControlGroup.of(trainer))
        with isolated(trainer, pl_module, with_optimizers=True, ranks=ranks) as sandbox:
            try:
                self.again = self.reproduce(
                    sandbox, TrainState.of(snapshot), entries, self.suite._witnesses.settings.by_ordinal, self.recorded
                )
            except CannotReplay as error:
                self.error = str(error)


def probed(make, tmp_path, change=lambda entries: entries, **options):
    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    probe = Probe(suite, change)
    train(make(), [suite, probe], tmp_path, max_steps=-1, **{"max_epochs": 2, **options})
    return probe


CASES = TASKS | {
    "one-cycle": (OneCycle, {"gradient_clip_val": 0.5}),
    "clip-by-value": (Digits, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16": (Digits, {"precision": "bf16-mixed"}),
    "double": (Digits, {"precision": "64-true"}),
    "loss-scaler": (Digits, loss_scaler()),
    "gru": (Gru, {"gradient_clip_val": 1.0}),
    "gan": (Gan, {}),
    "closure-by-hand": (ReturnsItsLoss, {}),
    "hooks-and-attributes": (Teacher, {"accumulate_grad_batches": 2}),
    "unfreezes": (Unfreezes, {}),
    "lbfgs": (Lbfgs, {}),
}


def is_exact(probe):
    assert probe.error is None
    again, recorded = probe.again, probe.recorded
    assert (again.steps, again.reached, again.differs_at) == (LAST - probe.first, LAST, None)
    assert 0 < probe.first < 30
    assert again.replayed == recorded[LAST]
    for leg in again.updates_replayed:
        assert leg.made.losses == tuple(recorded[entry.at.ordinal] for entry in leg.update.entries)
    assert all(torch.equal(again.weights[name], value) for name, value in probe.weights.items())
    for state, now in zip(again.end.optimizers, probe.states, strict=True):
        torch.testing.assert_close(state["state"], now, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_losses_weights_and_optimizer_states_come_out_to_the_bit(case, tmp_path):
    make, options = CASES[case]
    is_exact(probed(make, tmp_path, **options))


@pytest.mark.parametrize("shape", [Counters, GrowingLists, Metrics, Randomness, Recurrent, Ema])
def test_what_the_module_keeps_in_attributes_is_part_of_it(shape, tmp_path):
    """The shapes have five batches an epoch."""
    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    probe = Probe(suite)
    loader = shape().train_dataloader()
    train(shape(), [suite, probe], tmp_path, dataset=loader.dataset, batch_size=8, max_epochs=10)
    is_exact(probe)


@pytest.mark.parametrize(
    ("case", "short"),
    [("one-cycle", 3), ("gru", 6), ("gan", 3), ("bf16", 6), ("hooks-and-attributes", 4), ("hooks-and-attributes", 6)],
)
def test_in_two_goes_it_is_the_same(case, short, tmp_path, monkeypatch):
    """First to an earlier batch, and from there on."""

    def in_two_goes(sandbox, start, entries, *known):
        first = reproduce(sandbox, start, entries[:-short], *known)
        sandbox.rewind()
        assert sandbox.updates < len(entries)
        further = go_on(sandbox, first, entries, *known)
        assert sandbox.updates <= len(entries) + 2  # under manual optimisation the last batch of each is one too
        return further

    make, options = CASES[case]
    whole = probed(make, tmp_path / "whole", **options)
    monkeypatch.setattr(Probe, "reproduce", staticmethod(in_two_goes))
    probe = probed(make, tmp_path / "parts", **options)
    is_exact(probe)
    found, expected = ([leg.update.ordinal for leg in one.again.updates_replayed] for one in (probe, whole))
    assert found == expected[-len(found) :]
    assert len(found) >= 8


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
    """A loss that reads where in the run it is, and whose gradient at one step is not finite.

    The root of zero has an infinite slope.
    """

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * self.global_step + self.current_epoch)
        return loss + (self.net[0].weight.sum() * 0).sqrt() if self.global_step == 38 else loss


def test_it_stops_at_the_first_gradient_that_is_not_finite(tmp_path):
    probe = probed(Annealed, tmp_path)
    assert (probe.again.reached, probe.again.differs_at) == (38, None)
    assert probe.again.replayed == probe.recorded[38]
    assert all(value.isfinite().all() for value in probe.again.weights.values())
