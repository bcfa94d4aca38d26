"""Faults put together, with the suite, with a datamodule, and from YAML."""

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, Trainer
from testing.runs import AT, BATCHES, Items, Net, Records, collate, different, same, train
from torch.utils.data import DataLoader

from lightning_spike import TrainerStateStore, suite
from lightning_spike.records import Moment
from lightning_spike.sandbox.isolation import isolated, loss_of
from lightning_spike.testing import (
    DECOYS,
    FAULTS,
    UNCOVERED,
    ExtremeValues,
    LossMultiplied,
    RateJump,
    WrongLabels,
    WrongResult,
)


def rates(run):
    return [row.settings[0]["lr"] for row in run.rows]


def test_two_rates_multiply_and_the_plan_stays():
    plan = rates(train())
    run = train(RateJump(AT, 3.0, length=2), RateJump(AT + 1, 5.0, length=2))
    factors = [a / b for a, b in zip(rates(run), plan, strict=True)]
    expected = [1.0] * AT + [3.0, 15.0, 5.0] + [1.0] * (len(plan) - AT - 3)
    assert factors == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_under_accumulation_the_rate_is_that_of_the_batch_that_steps(accumulate):
    plan = [row.settings[0]["lr"] for row in train(accumulate_grad_batches=accumulate).rows if row.settings]
    run = train(RateJump(accumulate, 3.0, length=accumulate), accumulate_grad_batches=accumulate)
    used = [row.settings[0]["lr"] for row in run.rows if row.settings]
    assert [a / b for a, b in zip(used, plan, strict=True)] == pytest.approx([1, 3] + [1] * (len(plan) - 2), rel=1e-12)


def test_two_data_faults_in_one_batch_are_both_there():
    alone = train(ExtremeValues(AT, 5.0)).rows[AT].batch
    both = train(ExtremeValues(AT, 5.0), WrongLabels(AT, 1.0, seed=1)).rows[AT].batch
    healthy = train().rows[AT].batch
    assert same(both[0], alone[0])
    assert not (both[1] == healthy[1]).any()


def test_the_seed_decides_and_the_same_seed_gives_the_same():
    first, again, other = (train(ExtremeValues(AT, 5.0, seed=seed)).rows[AT].batch for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_a_share_of_the_samples():
    x, healthy = (train(*faults).rows[AT].batch[0] for faults in ([ExtremeValues(AT, 50.0, share=0.25)], []))
    assert (x != healthy).any(1).sum() == 1


class Data(LightningDataModule):
    """Overrides the hook that the module then does not get."""

    def train_dataloader(self):
        items = Items("tuple")
        return DataLoader(items, 4, collate_fn=collate(items))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x + 100, y


def test_a_datamodules_own_hook_comes_first():
    seen = {}
    for name, faults in {"plain": [], "faulty": [ExtremeValues(1, 1.0)]}.items():
        records, data = Records(), Data()
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=3, callbacks=[records, *faults], enable_model_summary=False, **options)
        trainer.fit(Net(), datamodule=data)
        seen[name] = [row.batch for row in records.rows]
        assert "on_after_batch_transfer" not in vars(data)
    assert same(seen["plain"][0], seen["faulty"][0])
    assert not same(seen["plain"][1], seen["faulty"][1])
    assert seen["faulty"][1][0].mean() > 90


@pytest.mark.parametrize("last", [True, False])
def test_with_the_suite_the_suite_sees_it_and_the_run_is_the_same(tmp_path, last):
    """Losses, batches and weights with the fault are the same with and without the suite, wherever the fault stands in
    the list."""
    watchers = suite(dirpath=tmp_path)
    fault = ExtremeValues.strong(at=AT)
    callbacks = [*watchers, fault] if last else [fault, *watchers]
    run = train(*callbacks)
    alone = train(ExtremeValues.strong(at=AT))
    assert not any(different(a, b) for a, b in zip(run.rows, alone.rows, strict=True))
    history = TrainerStateStore.of(run.trainer).history
    widths = history.series("batch/input/max_abs")
    assert widths[AT] > 10 * max(widths[:AT])


class RunsAgain(Callback):
    """A lab: runs the step of a batch again when it has ended, and the module's own loss on the same weights beside
    it."""

    def __init__(self):
        self.ratios = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        at = Moment(ordinal=batch_idx, step=batch_idx, epoch=0, batch_idx=batch_idx)
        with isolated(trainer, pl_module) as bench:
            torch.manual_seed(0)
            again = loss_of(bench.step(batch, batch_idx, at=at))
            torch.manual_seed(0)
            self.ratios.append(float(again.detach() / pl_module.loss(batch).detach()))


@pytest.mark.parametrize("fault_first", [True, False])
def test_what_the_code_does_happens_again_when_a_step_is_run_again(fault_first):
    fault, lab = LossMultiplied(AT, 1000.0), RunsAgain()
    train(*([fault, lab] if fault_first else [lab, fault]))
    assert lab.ratios == pytest.approx([1.0] * AT + [1000.0] + [1.0] * (BATCHES - AT - 1))


def test_what_the_machine_did_does_not():
    lab = RunsAgain()
    run, healthy = train(WrongResult(AT, 1e4), lab), train()
    assert different(run.rows[AT], healthy.rows[AT]) == {"loss", "grads"}
    assert lab.ratios == [1.0] * BATCHES


@pytest.mark.parametrize("kind", [*FAULTS, *DECOYS, *UNCOVERED])
def test_from_yaml(kind):
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    at = 0 if kind.__name__ in {"InitialWeightsScaled", "RateTooHigh"} else 50
    options = {"at": at, **kind.STRONG}
    spec = {"class_path": f"lightning_spike.testing.{kind.__name__}", "init_args": options}
    made = parser.instantiate_classes(parser.parse_object({"callback": spec})).callback
    assert made.description == kind.strong(at=at).description
