"""The trainings of the diagnosis benchmark: each has data that fit its net, and only faults that can happen in it."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.records import Moment, RunFacts, StepRow, ValidationPoint
from lightning_spike.store import TrainerStateStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The scripts' folder is on the path for the import only: one of them has the name of a folder of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(f"labelled_runs.{name}") for name in ("tasks", "runs", "judging")}


@pytest.fixture
def tasks(scripts):
    return scripts["tasks"]


@pytest.mark.parametrize(
    "name", ["images", "text", "table", "sequences", "nested", "patches", "origins", "colours", "tags"]
)
def test_a_step_on_a_batch_of_its_data_lowers_its_loss(tasks, name):
    assert name in tasks.TASKS
    torch.manual_seed(0)
    module, (train, held) = tasks.Module(name), tasks.loaders(name, seed=1)
    batch = next(iter(train))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    torch.manual_seed(1)
    before = module.training_step(batch, 0)
    before.backward()
    optimizer.step()
    torch.manual_seed(1)
    assert module.training_step(batch, 0) < before
    assert len(train.dataset) + len(held.dataset) == len(tasks.TASKS[name].data())
    assert (name in tasks.REGRESSION) == (tasks.TASKS[name].loss.__name__ in {"_next", "_coloured"})


def test_the_order_of_samples_is_new_in_every_epoch_and_the_same_for_every_run_of_a_seed(tasks):
    orders = []
    for epoch in (0, 1, 0):
        loader, _ = tasks.loaders("table", seed=4)
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_every_task_has_every_cause_in_two_strengths_as_far_as_it_can_happen(tasks, scripts):
    cells = scripts["runs"].all_cells([0, 1, 2], list(tasks.TASKS))
    faults = [cell for cell in cells if cell.sort == "fault"]
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cause for cell in faults for cause in cell.causes} == {cause.id for cause in catalogue()}
    assert {cell.strength for cell in faults} == {"mild", "strong"}
    adaptive = {cell.task for cell in faults if cell.causes == ("adam_epsilon_too_small",)}
    assert adaptive == tasks.ADAPTIVE
    assert {cell.task for cell in faults if cell.name == "WeightsPileUp"} == tasks.WEIGHTED
    assert {cell.task for cell in faults if cell.name in {"CorruptTokens", "TokenDrift"}} == tasks.TOKENS
    assert not {cell.task for cell in faults if cell.name == "LogOfZero"} & tasks.REGRESSION


def a_store(losses, validations=()):
    store = TrainerStateStore(RunFacts(started="2026-01-01T00:00:00+00:00"))
    for k, loss in enumerate(losses):
        at = Moment(ordinal=k, step=k, epoch=0, batch_idx=k)
        store.append(StepRow(at=at, values={"loss": float(loss)}, batch_size=8))
    for k, value in enumerate(validations):
        at = Moment(ordinal=50 * k, step=50 * k, epoch=0, batch_idx=0)
        store.note(ValidationPoint(at=at, metric="val_loss", value=float(value)))
    return store


def test_overfitting_does_harm_where_its_validation_rises_whatever_the_training_loss_does(scripts):
    cell = scripts["runs"].Cell(task="table", seed=0, sort="fault", name="FewBatches", causes=("overfitting",))
    twin = a_store(np.ones(480))
    falling, rising = np.linspace(1.0, 0.5, 12), np.r_[np.linspace(1.0, 0.5, 5), np.linspace(0.5, 1.5, 7)]
    assert not scripts["judging"].harmed(cell, a_store(3.0 * np.ones(480), falling), twin)
    assert scripts["judging"].harmed(cell, a_store(0.1 * np.ones(480), rising), twin)


def test_other_faults_do_harm_where_the_training_loss_is_worse_than_the_twins(scripts):
    cell = scripts["runs"].Cell(task="table", seed=0, sort="fault", name="RateJump", causes=("lr_scheduler_fault",))
    twin, worse = np.ones(300), np.ones(300)
    assert not scripts["judging"].harmed(cell, a_store(worse), a_store(twin))
    worse[250] = 2.5
    assert scripts["judging"].harmed(cell, a_store(worse), a_store(twin))
