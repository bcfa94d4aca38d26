"""Rollbacks inside a real `fit`, against runs that a callback of the test's own winds back with deepcopy and
`load_state_dict`."""

import copy
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import lr_scheduler
from torchmetrics import MeanMetric
from training_tasks import TASKS, Digits, build, digits, train

from lightning_spike.callbacks.anomaly_rollback import AnomalyRollback
from lightning_spike.errors import ConfigurationError
from lightning_spike.store import TrainerStateStore


def poisoned(kind, bad, factor=math.nan):
    """The task's module, whose loss is multiplied in the batches `bad`, counted over the run."""

    class Poisoned(kind):
        count = -1

        def training_step(self, batch, batch_idx):
            self.count += 1
            loss = super().training_step(batch, batch_idx)
            return loss * factor if self.count in bad else loss

    return Poisoned


def rollbacks(trainer):
    return [
        a.detail | {"ordinal": a.at.ordinal} for a in TrainerStateStore.of(trainer).actions if a.action == "rollback"
    ]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


class ByHand(Callback):
    """Winds back at the end of one batch to the state before another, the way a user would write it."""

    def __init__(self, taken, back):
        self.taken, self.back = taken, back
        self.count = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == self.taken:
            self.model = copy.deepcopy(pl_module.state_dict())
            self.optimizers = [copy.deepcopy(o.state_dict()) for o in trainer.optimizers]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.count == self.back:
            pl_module.load_state_dict(self.model)
            for optimizer, saved in zip(trainer.optimizers, self.optimizers, strict=True):
                rates = [g["lr"] for g in optimizer.param_groups]
                optimizer.load_state_dict(copy.deepcopy(saved))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
            pl_module.zero_grad()


class Watch(Callback):
    """What the run used at every step, and the weights at the end of every batch.

    Stands after the rollback in the list.
    """

    def __init__(self):
        self.rates, self.after, self.grads = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(copy.deepcopy(pl_module.state_dict()))
        self.grads.append([p.grad is not None for p in pl_module.parameters()])


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_nothing_wrong_is_bit_identical(task, tmp_path):
    plain, options = build(task)
    train(plain, [], tmp_path, **options, max_epochs=1)
    watched, options = build(task)
    trainer = train(watched, [AnomalyRollback(every=4)], tmp_path, **options, max_epochs=1)
    assert rollbacks(trainer) == []
    assert same(plain.state_dict(), watched.state_dict())


@pytest.mark.parametrize("task", ["cnn", "transformer"])
def test_after_a_nan_the_run_is_the_one_that_is_wound_back_by_hand(task, tmp_path):
    kind = poisoned(TASKS[task][0], {29})
    module, options = build(task)
    module.__class__ = kind
    trainer = train(module, [AnomalyRollback(every=10)], tmp_path, **options)
    reference, options = build(task)
    reference.__class__ = kind
    train(reference, [ByHand(taken=20, back=29)], tmp_path, **options)
    (done,) = rollbacks(trainer)
    assert (done["from_step"], done["to_step"], done["steps_lost"], done["batches_lost"]) == (29, 20, 10, 10)
    assert (done["reason"], done["episode"], done["attempt"], done["lr_factor"]) == ("nonfinite", 1, 1, 1.0)
    assert same(module.state_dict(), reference.state_dict())
    assert all(v.isfinite().all() for v in module.state_dict().values())
    assert math.isfinite(trainer.callback_metrics["train_loss_epoch"])


def test_a_nan_in_the_input_leaves_nothing_in_the_batch_norm(tmp_path):
    class BadPixels(Digits):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 20:
                batch[0][0, 0, 0, 0] = float("nan")

    broken, healed = BadPixels(), BadPixels()
    train(broken, [], tmp_path, max_epochs=1)
    assert broken.net[1].running_mean.isnan().all(), "the test's own premise"
    trainer = train(healed, [AnomalyRollback(every=5)], tmp_path, max_epochs=1)
    assert len(rollbacks(trainer)) == 1
    assert all(v.isfinite().all() for v in healed.state_dict().values())


SCHEDULES = {
    "cosine": lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, T_max=64), "interval": "step"},
    "one_cycle": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=64), "interval": "step"},
    "exponential": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.97), "interval": "step"},
    "plateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        "interval": "step",
        "frequency": 8,
        "monitor": "constant",
    },
}


def scheduled(name, bad):
    class Scheduled(poisoned(Digits, bad)):
        def training_step(self, batch, batch_idx):
            self.log("constant", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": SCHEDULES[name](optimizer)}

    return Scheduled()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_goes_on_as_planned_and_a_cut_holds_under_any_schedule(name, tmp_path):
    plain, rolled, cut = Watch(), Watch(), Watch()
    train(scheduled(name, set()), [plain], tmp_path)
    trainer = train(scheduled(name, {30, 40}), [AnomalyRollback(every=10), rolled], tmp_path)
    assert len(rollbacks(trainer)) == 2
    assert rolled.rates == plain.rates
    assert len(set(plain.rates)) > 3
    trainer = train(scheduled(name, {30, 40}), [AnomalyRollback(every=10, lr_scale=0.5), cut], tmp_path)
    factors = [1.0] * 31 + [0.5] * 10 + [0.25] * 23
    assert cut.rates == pytest.approx([r * f for r, f in zip(plain.rates, factors, strict=True)], rel=1e-12)
    assert [done["lr_factor"] for done in rollbacks(trainer)] == [0.5, 0.25]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks, "taken out again at the end"


def test_the_same_snapshot_serves_two_rollbacks(tmp_path):
    watch = Watch()
    module, options = build("transformer")
    module.__class__ = poisoned(type(module), {24, 27})
    trainer = train(module, [AnomalyRollback(every=20), watch], tmp_path, **options, max_epochs=1)
    first, second = rollbacks(trainer)
    assert (first["ordinal"], second["ordinal"]) == (24, 27)
    assert first["to_step"] == second["to_step"] == 0
    assert same(watch.after[24], watch.after[27])
    assert not same(watch.after[24], watch.after[26])


def test_a_nan_at_every_batch_uses_up_the_budget_ever_more_slowly_and_the_run_ends(tmp_path):
    module = poisoned(Digits, range(20, 1000))()
    with pytest.warns(UserWarning, match="all 4 rollbacks are used"):
        trainer = train(module, [AnomalyRollback(every=5, max_rollbacks=4)], tmp_path)
    assert trainer.global_step == 64
    ordinals = [done["ordinal"] for done in rollbacks(trainer)]
    assert ordinals == [20, 21, 23, 27], "held off for 0, 1, 3 batches after the 1st, 2nd, 3rd in a row"
    assert sum("used" in r for r in TrainerStateStore.of(trainer).remarks) == 1
    assert TrainerStateStore.of(trainer).disabled == []


class Damaged(Digits):
    """Somebody overwrites the weights after batch 60, and the learning rate is too low to learn them again."""

    def __init__(self, until=None):
        super().__init__(lr=0.01)
        self.until = until

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 61:
            self.kept = copy.deepcopy(self.state_dict())
            with torch.no_grad():
                self.net[5].weight.normal_(std=3.0)
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0
            self.trainer.lr_scheduler_configs.clear()
        if self.trainer.global_step == self.until:
            self.load_state_dict(self.kept)


def test_a_loss_that_does_not_come_back_within_the_patience_is_a_reason(tmp_path):
    module, _ = Damaged(), torch.manual_seed(1)
    trainer = train(module, [AnomalyRollback(patience=6, every=10)], tmp_path, max_epochs=4)
    (done,) = rollbacks(trainer)
    assert done["reason"] == "spike"
    assert done["ordinal"] == 61 + 6
    assert done["to_step"] <= 61
    loss = TrainerStateStore.of(trainer).history.series("loss")
    assert loss[61:68].min() > 4 * loss[50:61].mean()
    assert loss[69:].mean() < 2 * loss[50:61].mean()


def test_a_loss_that_comes_back_in_time_is_none(tmp_path):
    module, _ = Damaged(until=65), torch.manual_seed(1)
    trainer = train(module, [AnomalyRollback(patience=6, every=10)], tmp_path, max_epochs=4)
    assert len(TrainerStateStore.of(trainer).episodes) > 0
    assert rollbacks(trainer) == []


def test_running_means_and_metrics_of_the_epoch_lose_the_nan(tmp_path):
    class Logging(poisoned(Digits, {20})):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric(nan_strategy="disable")
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("poisoned", loss, on_epoch=True, on_step=False)
            self.log("worst", loss, on_epoch=True, on_step=False, reduce_fx="max")
            self.mean.update(loss.detach())
            self.losses.append(float(loss.detach()))
            return loss

    module = Logging()
    stopping = EarlyStopping("poisoned", patience=99, check_finite=True, check_on_train_epoch_end=True)
    trainer = train(module, [AnomalyRollback(every=10), stopping], tmp_path, max_epochs=1)
    (done,) = rollbacks(trainer)
    assert done["to_step"] == 10
    counted = module.losses[:10] + module.losses[21:]
    assert float(trainer.callback_metrics["poisoned"]) == pytest.approx(sum(counted) / len(counted), rel=1e-5)
    assert float(trainer.callback_metrics["worst"]) == pytest.approx(max(counted))
    assert float(module.mean.compute()) == pytest.approx(sum(module.losses[21:]) / len(module.losses[21:]), rel=1e-5)
    assert set(done["cleaned"]) == {"poisoned", "worst", "mean"}
    assert stopping.stopped_epoch == 0


def test_the_end_of_the_accumulation_window_is_waited_for(tmp_path):
    module, options = build("accumulation")
    module.__class__ = poisoned(type(module), {24})  # the first of its window
    watch = Watch()
    trainer = train(module, [AnomalyRollback(every=3), watch], tmp_path, **options)
    (done,) = rollbacks(trainer)
    assert done["ordinal"] == 26
    assert not any(watch.grads[26])
    assert all(v.isfinite().all() for v in module.state_dict().values())


def test_loggers_get_a_marker_and_their_axis_is_never_wound_back(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = train(
        poisoned(Digits, {20, 33})(), [AnomalyRollback(every=10)], tmp_path, logger=logger, log_every_n_steps=1
    )
    with (tmp_path / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert [(int(r["step"]), float(r["spike/rollback"])) for r in rows if r["spike/rollback"]] == [(20, 1.0), (33, 2.0)]
    assert len(rollbacks(trainer)) == 2


def test_reset_optimizer_starts_with_empty_state(tmp_path):
    sizes = []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(len(trainer.optimizers[0].state))

    callbacks = [AnomalyRollback(every=10, reset_optimizer=True), Sizes()]
    train(poisoned(Digits, {20})(), callbacks, tmp_path, max_epochs=1)
    assert [i for i, size in enumerate(sizes) if size == 0] == [20]


def test_an_overflow_that_the_scaler_skips_is_no_reason_but_one_that_stays_is(tmp_path):
    def fp16(bad):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        return train(poisoned(Digits, bad)(), [AnomalyRollback(every=5)], tmp_path, max_epochs=1, plugins=[plugin])

    assert rollbacks(fp16({20})) == []
    assert [done["ordinal"] for done in rollbacks(fp16({20, 21, 22, 23}))] == [23]


def test_count_and_rate_factor_survive_a_resume_that_loads_weights_only(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    callback = AnomalyRollback(every=10, lr_scale=0.5)
    train(poisoned(Digits, {20})(), [callback, checkpoint], tmp_path, max_epochs=1, enable_checkpointing=True)
    watch, again = Watch(), AnomalyRollback(every=10, lr_scale=0.5)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[again, watch, ModelCheckpoint(tmp_path, filename="again")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(digits(), 16)
    trainer.fit(Digits(), loader, ckpt_path=checkpoint.best_model_path, weights_only=True)
    assert again.own_state() == {"rollbacks": 1, "lr_factor": 0.5}
    plan = [0.05 * (1 + math.cos(math.pi * step / 200)) / 2 for step in range(32, 64)]
    assert watch.rates == pytest.approx([rate / 2 for rate in plan], rel=1e-6)


def test_nothing_to_go_back_to_is_said(tmp_path):
    module = poisoned(Digits, range(1000))()
    trainer = train(module, [AnomalyRollback()], tmp_path, max_epochs=1)
    assert rollbacks(trainer) == []
    remarks = TrainerStateStore.of(trainer).remarks
    assert any("could not: no snapshot from before batch 0" in r for r in remarks)
    assert len(remarks) < 8


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"patience": 0}, "patience"),
        ({"max_rollbacks": 2.5}, "max_rollbacks"),
        ({"lr_scale": 0.0}, "lr_scale"),
        ({"lr_scale": 1.5}, "lr_scale"),
        ({"reset_optimizer": "yes"}, "reset_optimizer"),
        ({"every": True}, "every"),
        ({"memory_mb": -1}, "memory_mb"),
        ({"cooldown": None}, "cooldown"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, name):
    with pytest.raises(ConfigurationError, match=rf"AnomalyRollback\({name}\): expected"):
        AnomalyRollback(**arguments)


def test_a_strategy_that_cannot_be_restored_is_refused_before_training(tmp_path):
    class Sharded(type(Trainer(accelerator="cpu", logger=False, barebones=True).strategy)):
        pass

    Sharded.__name__ = FSDPStrategy.__name__
    with pytest.raises(ConfigurationError, match=r"FSDPStrategy shards .* Leave AnomalyRollback out"):
        train(Digits(), [AnomalyRollback()], tmp_path, strategy=Sharded(device=torch.device("cpu")))


TWO_RANKS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from training_tasks import Digits, digits, seed_everything
from lightning_spike.callbacks.anomaly_rollback import AnomalyRollback
from lightning_spike.callbacks.overfit_watcher import OverfitWatcher
from lightning_spike.store import TrainerStateStore

class OnlyRankOne(Digits):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.current_epoch == 1 and batch_idx == 4 else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.current_epoch if self.global_rank else 0)))

class Write(Callback):
    def teardown(self, trainer, pl_module, stage):
        store = TrainerStateStore.of(trainer)
        out = {
            "actions": [
            (a.action, a.at.ordinal, *(a.detail.get(k) for k in ("to_step", "reason"))) for a in store.actions
        ],
            "weights": [float(p.double().sum()) for p in pl_module.parameters()],
            "steps": trainer.global_step,
            "disabled": [d.reason for d in store.disabled],
        }
        with open(f"{sys.argv[2]}/rank{trainer.global_rank}.json", "w") as file:
            json.dump(out, file)

seed_everything(0, verbose=False)
trainer = Trainer(
    max_epochs=3, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[2],
    callbacks=[AnomalyRollback(every=5), OverfitWatcher(restore_best=True, stop=True), Write()],
)
trainer.fit(OnlyRankOne(), DataLoader(digits(256), 16), DataLoader(digits(32), 16))
"""


@pytest.mark.ddp
def test_two_ranks_go_back_together_to_the_same_snapshot_though_only_one_saw_the_nan(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, str(script), str(Path(__file__).parents[1]), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - the script above
        command, env=environment, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero["weights"] == one["weights"]
    assert all(map(math.isfinite, zero["weights"]))
    assert (zero["steps"], zero["disabled"], one["disabled"]) == (24, [], [])
    assert one["actions"][0] in ([["rollback", 12, step, "nonfinite"] for step in (0, 5)])
    assert zero["actions"][0] == ["rollback", 12, one["actions"][0][2], "another_rank"]
    assert zero["actions"][1] == one["actions"][1] == ["restore_best", 23, None, None]
