"""Snapshots against copies that a callback of the test's own makes with deepcopy, in real trainings."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from training_tasks import TASKS, Digits, build, train

from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.snapshot import (
    CONFIRMING_BATCHES,
    MIN_NEAR_CADENCE,
    NEAR_SLOTS,
    SLOTS,
    Snapshots,
    near_cadence,
    refuses_snapshots,
)


class Holder(SpikeCallback):
    """Asks for snapshots as a callback does, and lets the test look and act."""

    def __init__(self, every=10, memory_mb=100, at_end=None):
        self.every, self.memory_mb = every, memory_mb
        self.at_end = at_end or (lambda trainer, module, snapshots, ordinal: None)
        self.verified = []

    def attach(self, trainer, module):
        self.snapshots = self.flight.share(Snapshots, Snapshots, trainer, module)
        self.snapshots.want(every=self.every, memory_mb=self.memory_mb)

    def act(self, batch, changed):
        self.verified.append([s.at.ordinal for s in self.snapshots.verified()])
        self.at_end(batch.trainer, batch.module, self.snapshots, batch.at.ordinal)


class Reference(Callback):
    """Deep copies of everything before each batch; stands after ours in the list."""

    def __init__(self):
        self.before = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        buffers = {n: b.clone() for n, b in pl_module.named_buffers()}
        optimizers = [copy.deepcopy(o.state_dict()) for o in trainer.optimizers]
        self.before.append((copy.deepcopy(pl_module.state_dict()) | buffers, optimizers, torch.get_rng_state()))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("task", TASKS)
def test_a_snapshot_is_the_state_before_its_batch_and_stays_so(task, tmp_path):
    module, options = build(task)
    taken, reference = {}, Reference()
    holder = Holder(at_end=lambda t, m, snapshots, o: taken.update({s.at.ordinal: s for s in snapshots.verified()}))
    train(module, [holder, reference], tmp_path, **options)
    assert len(taken) > 4
    for ordinal, snapshot in taken.items():
        model, optimizers, rng = reference.before[ordinal]
        assert same(snapshot.model, model)
        assert same(snapshot.optimizers, optimizers)
        assert torch.equal(snapshot.rng.torch, rng)


def test_taking_snapshots_leaves_weights_bit_identical(tmp_path):
    plain, options = build("cnn")
    train(plain, [], tmp_path, **options)
    watched, options = build("cnn")
    train(watched, [Holder(every=1)], tmp_path, **options)
    assert same(dict(plain.state_dict()), dict(watched.state_dict()))


def test_it_can_be_loaded_again_and_again_into_the_same_tensors(tmp_path):
    module, options = build("transformer")
    loaded, places, kept = [], [], []

    def load(trainer, module, snapshots, ordinal):
        if ordinal in (25, 27, 30):
            kept.append(snapshots.verified(before=12)[-1])
            snapshot = kept[0]
            places.append([p.data_ptr() for p in module.parameters()])
            snapshot.load_into(trainer, module)
            state = (module.state_dict(), trainer.optimizers[0].state_dict()["state"])
            loaded.append((snapshot.at.ordinal, *copy.deepcopy(state)))
            places.append([p.data_ptr() for p in module.parameters()])

    reference = Reference()
    train(module, [Holder(at_end=load), reference], tmp_path, **options, max_epochs=1)
    assert [ordinal for ordinal, *_ in loaded] == [10, 10, 10]
    for _, model, state in loaded:
        assert same(dict(model), reference.before[10][0])
        assert same(state, reference.before[10][1][0]["state"])
    assert all(place == places[0] for place in places)


def test_optimizer_state_that_came_later_is_removed(tmp_path):
    module, options = build("transformer")
    left = []

    def load(trainer, module, snapshots, ordinal):
        if ordinal == 12:
            first = snapshots.verified(before=1)[0]
            first.load_into(trainer, module)
            left.append((first.at.ordinal, len(trainer.optimizers[0].state)))

    train(module, [Holder(at_end=load)], tmp_path, **options, max_epochs=1)
    assert left == [(0, 0)]


def test_the_learning_rate_stays_unless_asked_for_and_other_group_entries_go_back(tmp_path):
    seen = []

    class Adaptive(torch.optim.SGD):
        """Keeps a number of its own in the group, as Prodigy does with `d`."""

        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["d"] = group.get("d", 1.0) * 2.0
            return loss

    class Module(Digits):
        def configure_optimizers(self):
            optimizer = Adaptive(self.parameters(), lr=0.05)
            optimizer.param_groups[0]["d"] = 1.0
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def load(trainer, module, snapshots, ordinal):
        if ordinal == 24:
            group = trainer.optimizers[0].param_groups[0]
            for asked in (False, True):
                snapshots.verified(before=11)[-1].load_into(trainer, module, hyperparameters=asked)
                seen.append((group["lr"], group["d"]))

    train(Module(), [Holder(at_end=load)], tmp_path, max_epochs=1)
    assert seen[0] == (pytest.approx(0.05 * 0.9**25), 2.0**10)
    assert seen[1] == (pytest.approx(0.05 * 0.9**10), 2.0**10)


def test_nested_optimizer_state_is_cloned_too(tmp_path):
    class Module(Digits):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2, history_size=3)

    seen = []

    def load(trainer, module, snapshots, ordinal):
        if ordinal in (15, 20):
            snapshots.verified(before=7)[-1].load_into(trainer, module)
            seen.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    reference = Reference()
    train(Module(), [Holder(every=6, at_end=load), reference], tmp_path, max_epochs=1)
    assert all(same(state, reference.before[6][1][0]["state"]) for state in seen)
    assert len(seen) == 2


class WithBuffers(Digits):
    """Has a buffer that `state_dict` leaves out, and one that is a single number seen many times."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(()).expand(4))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx)


def test_buffers_that_checkpoints_leave_out_go_back(tmp_path):
    seen = []

    def load(trainer, module, snapshots, ordinal):
        if ordinal == 24:
            snapshots.verified(before=11)[-1].load_into(trainer, module)
            seen.append(float(module.seen))

    holder = Holder(at_end=load)
    train(WithBuffers(), [holder], tmp_path, max_epochs=1)
    assert seen == [10.0]
    assert holder.flight.store.disabled == []


def test_averaged_models_in_callbacks_go_back(tmp_path):
    ema = EMAWeightAveraging(decay=0.9)
    seen = []

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 10:
                seen.append(copy.deepcopy(ema._average_model.state_dict()))

    def load(trainer, module, snapshots, ordinal):
        if ordinal == 24:
            snapshots.verified(before=11)[-1].load_into(trainer, module)
            seen.append(copy.deepcopy(ema._average_model.state_dict()))

    train(Digits(), [ema, Holder(at_end=load), Before()], tmp_path, max_epochs=1)
    assert same(dict(seen[0]), dict(seen[1]))


def test_the_loss_scale_goes_back(tmp_path):
    seen = []
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=4))

    def load(trainer, module, snapshots, ordinal):
        if ordinal in (30, 31):
            before = plugin.scaler.get_scale()
            snapshots.verified(before=11 if ordinal == 30 else 1)[-1].load_into(trainer, module)
            seen.append((before, plugin.scaler.get_scale()))

    train(Digits(), [Holder(at_end=load)], tmp_path, max_epochs=1, plugins=[plugin])
    (at_30, back_to_10), (_, back_to_0) = seen
    assert back_to_10 < at_30
    assert back_to_0 == 65536.0


def test_it_is_believed_only_after_its_flag_and_the_losses_after_it(tmp_path):
    module, options = build("cnn")
    holder = Holder(every=10)
    train(module, [holder], tmp_path, **options)
    assert holder.verified[0] == [0], "the state the run began with needs one accepted loss"
    assert 10 not in holder.verified[10 + CONFIRMING_BATCHES - 1]
    assert 10 in holder.verified[10 + CONFIRMING_BATCHES]


class Poisoned(Digits):
    """From batch 15 on one number somewhere is not finite, while the loss does not show it."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.register_buffer("unused", torch.zeros(3))
        self.idle = nn.Parameter(torch.zeros(3))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 15:
            with torch.no_grad():
                state = self.trainer.optimizers[0].state[self.net[5].bias]
                {"buffer": self.unused, "parameter": self.idle, "state": state.get("extra", self.unused)}[
                    self.where
                ].view(-1)[0] = float("nan")

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.trainer.optimizers[0].state[self.net[5].bias]["extra"] = torch.zeros(2)


@pytest.mark.parametrize("where", ["buffer", "parameter", "state"])
def test_one_number_that_is_not_finite_keeps_a_snapshot_from_being_believed(where, tmp_path):
    holder = Holder(every=10)
    train(Poisoned(where), [holder], tmp_path, max_epochs=1)
    assert holder.verified[-1] == [0, 10]


class Spiking(Digits):
    """The loss is a hundred thousandfold in batches 60 to 69."""

    count = -1

    def training_step(self, batch, batch_idx):
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss.detach() * 1e5 + loss * 0 if 60 <= self.count <= 69 else loss


def test_what_was_taken_in_an_episode_is_never_believed(tmp_path):
    holder = Holder(every=4)
    trainer = train(Spiking(), [holder], tmp_path, max_epochs=17, batch_size=64)
    assert trainer.global_step > 120
    ever = {ordinal for verified in holder.verified for ordinal in verified}
    assert not ever & set(range(60 - CONFIRMING_BATCHES + 1, 71))
    assert max(ever) > 90


def test_snapshots_are_taken_at_window_starts_only(tmp_path):
    module, options = build("accumulation")
    holder = Holder(every=4)
    train(module, [holder], tmp_path, **options)
    positions = {s % 32 % 3 for verified in holder.verified for s in verified}
    assert positions == {0}


def test_the_number_held_is_bounded_and_reaches_back(tmp_path):
    module, options = build("cnn")
    holder = Holder(every=2)
    train(module, [holder], tmp_path, **options, max_epochs=4)
    assert max(map(len, holder.verified)) <= SLOTS
    late = holder.verified[120]
    assert 120 - late[0] >= 10
    assert 120 - late[-1] <= 2 + CONFIRMING_BATCHES + 2


class Near(Holder):
    def attach(self, trainer, module):
        self.snapshots = self.flight.share(Snapshots, Snapshots, trainer, module)
        self.snapshots.want_near(72)


def test_near_snapshots_lie_8_to_24_batches_before_any_onset_and_reach_back(tmp_path):
    module, options = build("cnn")
    holder = Near()
    train(module, [holder], tmp_path, **options, max_epochs=5)
    assert max(map(len, holder.verified)) <= NEAR_SLOTS
    for now, verified in enumerate(holder.verified[100:], 100):
        assert CONFIRMING_BATCHES <= now - verified[-1] <= CONFIRMING_BATCHES + MIN_NEAR_CADENCE
        assert now - verified[0] >= 72


def test_near_ones_stand_beside_the_far_ones_that_somebody_else_asked_for(tmp_path):
    class Both(Near):
        def attach(self, trainer, module):
            super().attach(trainer, module)
            self.snapshots.want(every=50, memory_mb=4096)

    module, options = build("cnn")
    holder = Both()
    train(module, [holder], tmp_path, **options, max_epochs=6)
    assert holder.snapshots.every == MIN_NEAR_CADENCE
    assert holder.verified[-1][0] == 0
    assert len(holder.verified[-1]) > SLOTS


def test_the_larger_the_model_the_rarer():
    cadences = [near_cadence(slots, 72) for slots in range(1, NEAR_SLOTS + 1)]
    assert cadences == sorted(cadences, reverse=True)
    assert (cadences[0], cadences[-1]) == (50, MIN_NEAR_CADENCE)
    assert near_cadence(4, 72) * 2 >= 72


def test_too_little_memory_is_said_and_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_spike.record.snapshot.MB", 1024)  # the model has 22 KB
    module, options = build("cnn")
    holder = Holder(memory_mb=40)
    train(module, [holder], tmp_path, **options)
    assert holder.verified[-1] == []
    assert [r for r in holder.flight.store.remarks if "memory_mb is 40" in r] == [
        f"No snapshots: {holder.snapshots.unavailable}"
    ]


def test_the_densest_cadence_and_the_largest_memory_count():
    one, other = Snapshots(), Snapshots()
    one.want(every=20, memory_mb=100)
    one.want(every=7, memory_mb=9000)
    other.want(every=7, memory_mb=9000)
    other.want(every=20, memory_mb=100)
    assert (one.every, one.memory_mb) == (other.every, other.memory_mb) == (7, 9000)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused_by_name(kind):
    class Own(kind):
        pass

    for strategy in (kind, Own):
        why = refuses_snapshots(SimpleNamespace(strategy=object.__new__(strategy)))
        assert kind.__name__ in why or "FSDP" in why
    assert refuses_snapshots(SimpleNamespace(strategy=object.__new__(DDPStrategy))) is None


def test_a_mask_of_infinities_in_a_buffer_is_no_poison(tmp_path):
    class Masked(Digits):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    holder = Holder()
    train(Masked(), [holder], tmp_path, max_epochs=1)
    assert holder.verified[-1]
