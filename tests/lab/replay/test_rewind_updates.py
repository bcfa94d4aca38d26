"""Updates undone, against the states that the run was really in."""

import pytest
import torch
from lab.episodes import SIZE
from lab.made import moment
from lightning.pytorch import Callback, seed_everything
from training_tasks import Digits, train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.lab.replay.rewind_updates import can_rewind_updates, rewind_updates
from lightning_spike.lab.replay.update import updates_of
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

FIRST, LAST = 30, 34


def with_optimizer(kind, **options):
    class Own(Digits):
        def configure_optimizers(self):
            return kind(self.parameters(), **options)

    return Own


class Undo(Callback):
    """Keeps the states of some batches, and at the last of them winds back from there."""

    def __init__(self, suite):
        self.suite, self.count, self.kept, self.can, self.gaps = suite, -1, {}, None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if FIRST <= self.count <= LAST:
            with isolated(trainer, pl_module, with_optimizers=True) as sandbox:
                self.kept[self.count] = TrainState.take(sandbox, moment(self.count))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.count != LAST:
            return
        entries = [e for e in self.suite._witnesses.ring.entries() if FIRST <= e.at.ordinal <= LAST]
        updates = updates_of(entries, self.suite._witnesses.settings.by_ordinal)
        with isolated(trainer, pl_module, with_optimizers=True) as sandbox:
            self.can = can_rewind_updates(sandbox)
            if not self.can:
                return
            for wound in rewind_updates(sandbox, updates, self.kept[LAST], self.kept):
                state = wound.state
                really = self.kept[state.at.ordinal]
                names = [name for name, _ in pl_module.named_parameters()]
                self.gaps.append(gap([state.weights[n] for n in names], [really.weights[n] for n in names]))
                for key in really.optimizers[0]["state"][0]:
                    self.gaps.append(gap(of_all(state, key), of_all(really, key)))


def of_all(state, key):
    return [entry[key] for entry in state.optimizers[0]["state"].values()]


def gap(a, b):
    """Over all tensors: the gradient of a bias before a BatchNorm is nothing but rounding."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())


def undone(make, tmp_path, **options):
    seed_everything(0, verbose=False)
    suite = CounterfactualReplay()
    undo = Undo(suite)
    train(make(), [suite, undo], tmp_path, max_epochs=2, batch_size=SIZE, **options)
    return undo


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(with_optimizer(torch.optim.SGD, lr=0.05, momentum=0.9), {}, id="sgd"),
        pytest.param(
            with_optimizer(torch.optim.SGD, lr=0.05, momentum=0.8, dampening=0.2, weight_decay=0.01),
            {"gradient_clip_val": 0.3},
            id="sgd-decay-clipped",
        ),
        pytest.param(with_optimizer(torch.optim.Adam, lr=0.003, weight_decay=0.01), {}, id="adam"),
        pytest.param(
            with_optimizer(torch.optim.AdamW, lr=0.003, betas=(0.8, 0.95), weight_decay=0.1),
            {"accumulate_grad_batches": 2},
            id="adamw-accumulated",
        ),
    ],
)
def test_winding_back_comes_to_where_the_run_was(make, options, tmp_path):
    undo = undone(make, tmp_path, **options)
    assert undo.can
    assert len(undo.gaps) >= 4
    assert max(undo.gaps) < 1e-3


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(with_optimizer(torch.optim.SGD, lr=0.05), id="no-momentum"),
        pytest.param(with_optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True), id="nesterov"),
        pytest.param(with_optimizer(torch.optim.Adam, lr=0.003, amsgrad=True), id="amsgrad"),
        pytest.param(with_optimizer(torch.optim.RMSprop, lr=0.003), id="another"),
    ],
)
def test_an_update_that_needs_more_than_the_state_after_it_is_not_undone(make, tmp_path):
    assert undone(make, tmp_path).can is False
